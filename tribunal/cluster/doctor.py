"""A preflight that measures instead of guessing: this machine, the run directory, and with ``--submit`` the cluster itself.

Two short CPU jobs: one checks files from two nodes, the clients inside a job and a requeue (about half a minute and the
site's requeue delay); the other runs into a two-minute limit to see who hears the signal, and when. Where the experiment's
jobs ask for GPUs, a third asks for one and has torch compute on it. The result is a table and a site profile,
``.tribunal-site.json``, from which submit takes the lead and the route of resubmission.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tribunal.cluster import queue, site
from tribunal.cluster.job import root
from tribunal.cluster.prefetch import OFFLINE
from tribunal.cluster.quota import quota, room
from tribunal.cluster.resources import resolve
from tribunal.cluster.slurm import SlurmError, call, clean_environment
from tribunal.core.config import Experiment
from tribunal.core.errors import StorageError
from tribunal.core.storage import fsync_folder, make_folder, write_atomic, write_json

PROBE = Path(__file__).with_name("doctor_probe.py")
ASKED_LEAD_S = 45
DEFAULT_LEAD_S = 300
ROOM_GB = 5.0
ROOM_FILES = 50_000
TRIAL_MB = 64
PENDING_S = 900.0
"""How long the jobs may wait in the queue before doctor gives up on them."""
CONFIG = ("SLURM_VERSION", "KillWait", "JobRequeue", "MaxArraySize", "ProctrackType", "PreemptType", "PreemptMode", "SlurmctldParameters")


class Finding(NamedTuple):
    """One line of the table; ``good`` is None for a plain fact."""

    what: str
    good: bool | None
    said: str


def here() -> Iterator[Finding]:
    """What can be measured on this machine, without a job."""
    version = sys.version_info
    yield Finding("Python", version >= (3, 10), f"{version.major}.{version.minor}.{version.micro} in {sys.prefix}")
    yield from run_directory()
    cache = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    yield Finding("hub cache", None, f"{cache} (HF_HOME); {room(_nearest(Path(cache)))}")
    missing = [name for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo") if shutil.which(name) is None]
    if missing:
        yield Finding(
            "SLURM clients", False, f"{', '.join(missing)} not on PATH: load the site's SLURM module; --cluster local works without"
        )
        return
    try:
        config = call(["scontrol", "show", "config"])
    except SlurmError as error:
        yield Finding("SLURM controller", False, str(error))
        return
    values = {name: match[1].strip() for name in CONFIG if (match := re.search(rf"^{name}\s*=\s*(.*)$", config, re.MULTILINE))}
    yield Finding("SLURM controller", True, f"version {values.get('SLURM_VERSION', '?')}")
    yield Finding("partitions", None, ", ".join(f"{name} ({limit})" for name, limit in queue.partitions().items()))
    yield Finding("GPUs offered", None, ", ".join(queue.gpus()) or "none: experiments with slurm.gpus above 0 cannot run here")
    yield Finding("after SIGTERM", None, f"SIGKILL follows in {values.get('KillWait', '?')}")
    preempts = values.get("PreemptMode", "OFF")
    sends = "preempt_send_user_signal" in values.get("SlurmctldParameters", "")
    yield Finding("preemption", None, f"{preempts}; a preempted job hears {'SIGUSR1' if sends else 'SIGTERM'}")
    yield Finding("largest array", None, f"{values.get('MaxArraySize', '?')} tasks (more are split)")
    if "linuxproc" in values.get("ProctrackType", ""):
        yield Finding("process tracking", None, "linuxproc: a process may outlive its job; its writes are fenced off")


def run_directory() -> Iterator[Finding]:
    """Room, quota, exclusive creation, rename and fsync on the places of state and results."""
    for kind in ("checkpoints", "results"):
        folder = root() / kind
        trial = folder / f".doctor-{os.getpid()}"
        try:
            make_folder(folder)
            began = time.monotonic()
            with trial.open("xb") as file:
                for _ in range(TRIAL_MB):
                    file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            took = time.monotonic() - began
            trial.rename(trial.with_suffix(".moved"))
            fsync_folder(folder)
        except (OSError, StorageError) as error:
            yield Finding(f"{kind}/", False, f"{folder}: {error}")
            continue
        finally:
            trial.unlink(missing_ok=True)
            trial.with_suffix(".moved").unlink(missing_ok=True)
        free = room(folder)
        enough = free.gb >= ROOM_GB and (free.files is None or free.files >= ROOM_FILES)
        said = f"{folder}: {TRIAL_MB / took:.0f} MB/s with fsync, {free}"
        yield Finding(f"{kind}/", enough, said + ("" if enough else f"; at least {ROOM_GB:.0f} GB and {ROOM_FILES:,} files are advised"))
        if (mine := quota(folder)) is not None:
            good = None if mine.full is None else not mine.full
            yield Finding(f"{kind}/ quota", good, mine.said + ("; nearly used up" if mine.full else ""))


def on_the_cluster(experiment: Experiment | None, say: Callable[[str], None]) -> tuple[list[Finding], dict[str, Any]]:
    """Queue the two jobs, wait for them, and say what they measured; the second value is the site profile."""
    out = make_folder(root() / "checkpoints" / f".doctor-{os.getpid()}").resolve()
    jobs: list[str] = []
    try:
        options = _options(experiment)
        nodes = 2 if queue.test_only(_script(out, "trial", [*options, "--nodes=2", "--ntasks-per-node=1"], "true")) is None else 1
        first = [*options, f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--time=10", "--requeue", "--open-mode=append"]
        jobs.append(_submit(_script(out, "files", first, _files_body(out, experiment))))
        second = [*options, "--nodes=1", "--ntasks=1", "--time=2", f"--signal=USR1@{ASKED_LEAD_S}", "--no-requeue"]
        jobs.append(_submit(_script(out, "signal", second, _signal_body(out))))
        gpu = _gpu_options(experiment)
        if gpu is not None:
            third = [*gpu, "--job-name=tribunal-doctor", "--nodes=1", "--ntasks=1", "--time=10", "--no-requeue"]
            jobs.append(_submit(_script(out, "gpu", third, _gpu_body(out))))
        say(f"queued two short CPU jobs{' and one for a GPU' if gpu is not None else ''}: {', '.join(jobs)}")
        _wait(jobs, say)
        findings = [*_file_findings(out, nodes), *_requeue_findings(out), *_offline_findings(out, experiment), *_signal_findings(out)]
        return [*findings, *_gpu_findings(out, experiment, asked=gpu is not None)], _profile(out)
    finally:
        queue.cancel(jobs)
        shutil.rmtree(out, ignore_errors=True)


def save_profile(profile: dict[str, Any]) -> Path:
    """Keep what submit uses, beside the site file."""
    path = site.project_folder() / site.PROFILE
    write_json(path, profile)
    return path


def table(findings: list[Finding]) -> str:
    marks = {True: "ok", False: "FAULT", None: ""}
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{marks[finding.good]:<6} {finding.what:<{width}}  {finding.said}" for finding in findings)


# the jobs ------------------------------------------------------------------------------------------------------------


def _options(experiment: Experiment | None) -> list[str]:
    """Partition, account and so on, as a CPU job of the experiment would ask."""
    values: dict[str, str | None] = {
        "partition": site.site_value("TRIBUNAL_SLURM_PARTITION"),
        "account": site.site_value("TRIBUNAL_SLURM_ACCOUNT"),
        "qos": site.site_value("TRIBUNAL_SLURM_QOS"),
    }
    if experiment is not None:
        from tribunal.cluster.launch import make_job
        from tribunal.core import registry

        asked = resolve(make_job(registry.names("jobs")[0], experiment))
        values = {"partition": asked.partition, "account": asked.account, "qos": asked.qos}
    return [f"--{name}={value}" for name, value in values.items() if value] + [
        "--job-name=tribunal-doctor",
        "--cpus-per-task=1",
        "--mem=500M",
    ]


def _gpu_options(experiment: Experiment | None) -> list[str] | None:
    """What the experiment's first job with GPUs asks for, with one GPU; None where none of them asks for any."""
    if experiment is None:
        return None
    from tribunal.cluster.launch import make_job
    from tribunal.core import registry

    for name in registry.names("jobs"):
        asked = resolve(make_job(name, experiment))
        if asked.gpus:
            given = {"partition": asked.partition, "account": asked.account, "qos": asked.qos, "constraint": asked.constraint}
            values = {**given, "gres": f"{asked.gres or 'gpu'}:1", "cpus-per-task": "1", "mem": "8G"}
            return [f"--{option}={value}" for option, value in values.items() if value]
    return None


def _script(out: Path, name: str, options: list[str], body: str) -> Path:
    path = out / f"{name}.sbatch"
    header = "\n".join(f"#SBATCH {option}" for option in [*options, f"--output={out}/{name}.log"])
    write_atomic(path, f"#!/bin/bash\n{header}\n{body}\n")
    return path


def _files_body(out: Path, experiment: Experiment | None) -> str:
    probe = f"{shlex.quote(sys.executable)} -u {shlex.quote(str(PROBE))}"
    place = shlex.quote(str(out))
    lines = [f'[ "${{SLURM_RESTART_COUNT:-0}}" != 0 ] || srun --ntasks=2 {probe} files {place}']
    if experiment is not None:
        exports = " ".join(f"{key}={value}" for key, value in OFFLINE.items())
        code = (
            "import sys; from tribunal.cluster.prefetch import read_offline; from pathlib import Path; read_offline(Path(sys.argv[1]), [])"
        )
        read = f"env {exports} PYTHONPATH={shlex.quote(_python_path())} {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
        lines.append(f"{read} {shlex.quote(str(experiment.path.resolve()))} >{place}/offline.log 2>&1; echo $? >{place}/offline.rc")
    return "\n".join([*lines, f"exec {probe} start {place}"])


def _signal_body(out: Path) -> str:
    probe = f"{shlex.quote(sys.executable)} -u {shlex.quote(str(PROBE))} signal {shlex.quote(str(out))}"
    return f"{probe} batch &\nsrun {probe} step\nwait"


def _gpu_body(out: Path) -> str:
    return f"exec srun {shlex.quote(sys.executable)} -u {shlex.quote(str(PROBE))} gpu {shlex.quote(str(out))}"


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(site.project_folder()), os.environ.get("PYTHONPATH")]))


def _submit(script: Path) -> str:
    return call(["sbatch", "--parsable", str(script)], env=clean_environment()).strip().partition(";")[0]


def _wait(jobs: list[str], say: Callable[[str], None]) -> None:
    """Until both have left the queue, or wait in it for too long."""
    began, told = time.monotonic(), 0.0
    while True:
        lines = call(["squeue", "-h", "-j", ",".join(jobs), "-o", "%A %T %r"]).splitlines()
        if not lines:
            return
        waiting = all(" PENDING " in line for line in lines)
        if waiting and time.monotonic() - began > PENDING_S:
            say(f"gave up after {PENDING_S / 60:.0f} minutes in the queue ({'; '.join(lines)})")
            return
        if time.monotonic() - told > 30:
            say(f"waiting: {'; '.join(lines)}")
            told = time.monotonic()
        time.sleep(5)


# what they measured --------------------------------------------------------------------------------------------------


def _notes(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _file_findings(out: Path, nodes: int) -> Iterator[Finding]:
    notes = {row["rank"]: row for row in _notes(out, "files")}
    if len(notes) < 2:
        yield Finding("files from two nodes", False, f"the tasks did not both run; log: {_tail(out / 'files.log')}")
        return
    where = f"{notes[0]['node']} and {notes[1]['node']}" + ("" if nodes == 2 else " (one node only: nothing is said about a shared disk)")
    winners = sum(row["won"] for row in notes.values())
    yield Finding("exclusive creation", winners == 1, f"{winners} of 2 tasks won, on {where}")
    late = notes[1]["seen"] - notes[0]["renamed"]
    yield Finding("atomic rename", notes[1]["whole"], f"seen whole on the other task {max(late, 0):.1f} s after it")


def _requeue_findings(out: Path) -> Iterator[Finding]:
    starts = {row["restarts"]: row for row in _notes(out, "starts")}
    if 0 not in starts:
        yield Finding("clients inside a job", False, f"the job did not start; log: {_tail(out / 'files.log')}")
        return
    first = starts[0]
    yield Finding(
        "scontrol inside a job", first["controller"], "answers" if first["controller"] else "does not: jobs cannot requeue themselves"
    )
    yield Finding(
        "sbatch inside a job", first["sbatch_works"], "works" if first["sbatch_works"] else "does not: no fresh submission from a job"
    )
    asked = (_notes(out, "requeue") or [{"refused": "ended before it could ask", "time": 0}])[0]
    if 1 in starts:
        delay = starts[1]["time"] - first["time"]
        yield Finding("requeue", True, f"same job id again after {delay:.0f} s")
        kept = _text(out / "files.log").count("doctor: start")
        yield Finding("log", kept == 2, "appended over the requeue" if kept == 2 else "the first start's lines are gone")
    else:
        yield Finding("requeue", False, f"refused: {asked['refused']}; jobs continue by a fresh sbatch")
    yield Finding("GPU in a CPU job", None, first["gpus"] or "none, as it should be")


def _offline_findings(out: Path, experiment: Experiment | None) -> Iterator[Finding]:
    if experiment is None:
        yield Finding("model and dataset", None, "not tried: name an experiment (tribunal doctor EXPERIMENT.yaml --submit)")
        return
    good = _text(out / "offline.rc").strip() == "0"
    yield Finding(
        "model and dataset", good, "readable offline on a compute node" if good else f"{_tail(out / 'offline.log')}; tribunal prefetch"
    )


def _signal_findings(out: Path) -> Iterator[Finding]:
    lead = _lead(out, "step")
    heard = {who: [row["signal"] for row in _notes(out, f"signals-{who}") if row["signal"].startswith("SIG")] for who in ("step", "batch")}
    if lead is None:
        yield Finding("early signal", False, f"a task of srun heard {heard['step'] or 'nothing'}: only the job's own deadline will stop it")
    else:
        yield Finding("early signal", True, f"a task of srun hears SIGUSR1 {lead:.0f} s before SIGTERM (asked for {ASKED_LEAD_S} s)")
    yield Finding(
        "batch shell", None, f"its child heard {', '.join(dict.fromkeys(heard['batch'])) or 'nothing'}: work must be started by srun"
    )
    orphans = [who for who in ("step", "batch") if any(row["signal"] == "orphaned" for row in _notes(out, f"signals-{who}"))]
    yield Finding("outlives its job", None, f"a process of the {' and the '.join(orphans)}" if orphans else "nothing seen")


def _gpu_findings(out: Path, experiment: Experiment | None, *, asked: bool) -> Iterator[Finding]:
    if not asked:
        why = "none of the experiment's jobs asks for one" if experiment is not None else "name an experiment whose jobs use one"
        yield Finding("GPU in a GPU job", None, f"not tried: {why}")
        return
    if not (notes := _notes(out, "gpu")):
        yield Finding("GPU in a GPU job", False, f"the job did not come to run; log: {_tail(out / 'gpu.log')}")
        return
    seen = notes[0]
    where = f"on {seen['node']}, CUDA_VISIBLE_DEVICES={seen['devices'] or 'not set'}"
    yield Finding("GPU in a GPU job", bool(seen["devices"] or seen["listed"]), f"{where}; nvidia-smi: {seen['listed'] or seen['refused']}")
    torch = seen["torch"]
    if "device" in torch:
        yield Finding("torch on the GPU", True, f"torch {torch['version']} computes on {torch['device']}, {torch['gb']:.0f} GB")
    elif torch.get("cuda") is None and "version" in torch:
        cure = "run setup_cluster.sh with TORCH_INDEX_URL=<index of the build for this site's CUDA>"
        yield Finding("torch on the GPU", False, f"torch {torch['version']} is a CPU build: {cure}")
    else:
        yield Finding("torch on the GPU", False, torch["error"])


def _lead(out: Path, who: str) -> float | None:
    times = {row["signal"]: row["time"] for row in reversed(_notes(out, f"signals-{who}"))}
    if "SIGUSR1" not in times:
        return None
    end = times.get("SIGTERM") or float(_text(out / f"alive-{who}") or times["SIGUSR1"])
    return end - times["SIGUSR1"]


def _profile(out: Path) -> dict[str, Any]:
    """What submit uses: seconds of lead to ask for, and how jobs go on here."""
    lead = _lead(out, "step")
    starts = {row["restarts"]: row for row in _notes(out, "starts")}
    first = starts.get(0, {})
    route = "requeue" if 1 in starts else "sbatch" if first.get("sbatch_works") else "chain"
    return {
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "signal_lead_s": DEFAULT_LEAD_S + max(0, round(ASKED_LEAD_S - lead)) if lead is not None else DEFAULT_LEAD_S,
        "measured_lead_s": round(lead, 1) if lead is not None else None,
        "route": route,
        "requeue_delay_s": round(starts[1]["time"] - first["time"], 1) if 1 in starts else None,
    }


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(path: Path) -> str:
    return (_text(path).strip().splitlines() or ["nothing in its log"])[-1]
