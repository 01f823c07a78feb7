"""Every job that has a script, submitted by it and interrupted once on the real SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.slurm.bench import PATIENCE_S, PROJECT, Bench
from tribunal.cluster.launch import make_job
from tribunal.cluster.pipelines import PIPELINES
from tribunal.core.config import load_experiment
from tribunal.core.receipts import read_receipt, verify

Value = TypeVar("Value")
JOBS = ("train_reasoner", *PIPELINES["trial"])
AT_START = {"label_traces", "select_answers", "report"}
"""Of a single unit, or done within a tenth of a second: interrupted while they start. Every other job is interrupted between its units."""
EXPERIMENT = """
name: x
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 40}
generate_traces: {samples_per_problem: 2, max_new_tokens: 120, wave_size: 16}
label_traces: {min_per_class: 5}
extract_activations: {layers: [1], poolings: [mean, last], store_dtype: float32, traces_per_shard: 8}
train_probes: {min_per_class: 5, permutations: 10, bootstrap: 100, random_directions: 2}
train_reasoner: {steps: 10, batch_size: 8, evaluation_problems: 10}
select_answers: {chunk: 1, bootstrap: 100}
monitor_traces: {traces_per_shard: 2, bootstrap: 100, percents: [50], positions: [5, 30]}
steer:
  {traces_per_class: 2, strengths: [0.3], start: [middle], project_out: false, adaptive_strengths: [], slots: 16, wave_size: 16,
   bootstrap: 100, calibration_traces: 4}
attribute_direction: {traces: 40, random_sets: 2, problems: 2, samples: 1, slots: 4, bootstrap: 100}
transfer_probes: {permutations: 20, bootstrap: 100}
label_sentences: {samples_per_problem: 1}
train_oracle:
  {tasks: [carry, random_bit], lora: {rank: 2, alpha: 4, dropout: 0.1}, batch_size: 8, steps: 8, text_only_steps: 2, validate_every: 4,
   validate_items: 8, keep: 2, max_new_tokens: 4, traces_per_file: 20, audit: {min_per_split: 5}}
evaluate_oracle: {items_per_task: 8, chunk: 4, bootstrap: 100, traces_per_file: 20}
"""


@pytest.mark.slow
def test_every_job_interrupted_once_ends_with_the_digest_of_an_undisturbed_run(bench: Bench) -> None:
    scripts = {path.stem for path in (PROJECT / "sbatch").glob("*.sbatch")} - {"calibrate"}  # whose stages are here one by one
    assert scripts == set(JOBS), "a script without a drill, or a job without a script"
    bench.env["PYTHONPATH"] = str(PROJECT)
    path = bench.folder / "x.yaml"
    path.write_text(EXPERIMENT)
    experiment = load_experiment(path)
    reference = _start_undisturbed(bench)
    drilled: dict[str, Future[None]] = {}
    try:
        with ThreadPoolExecutor(len(JOBS)) as threads:
            for job in JOBS:
                kind = make_job(job, experiment)
                needs = list(drilled.values()) if kind.reads_all else [drilled[needed] for needed in kind.needs]
                drilled[job] = threads.submit(_drill, bench, job, needs)
        for future in drilled.values():
            future.result()
        bench.gone()
        errors = reference.communicate(timeout=300)[1]
        assert reference.returncode == 0, errors
    finally:
        reference.kill()
    for job in JOBS:
        receipt = read_receipt(bench.results(job))
        expected = read_receipt(bench.folder / "undisturbed" / "results" / "x" / job)
        assert receipt is not None and expected is not None
        assert receipt["digest"] == expected["digest"], f"{job}: another digest than undisturbed"
        assert verify(bench.results(job), receipt) == []
        assert bench.causes(receipt) == ["asked", "finished"], f"{job}: {bench.causes(receipt)}"
        assert len({row["job"] for row in receipt["generations"]}) == 1, f"{job}: not requeued but queued anew"
        units = [row["units"] for row in receipt["generations"]]
        assert sum(units) == expected["totals"]["units"], f"{job}: units done twice or lost: {units}"
        assert units[1] > 0 and (units[0] > 0) == (job not in AT_START), f"{job}: interrupted too early or too late: {units}"
    assert [path.name for path in (bench.folder / "checkpoints" / "x").iterdir()] == ["submissions"]
    left = [path for path in bench.folder.rglob(".*") if "undisturbed" not in path.parts]
    assert left == [], "temporary files or locks left behind"


def _drill(bench: Bench, job: str, needs: list[Future[None]]) -> None:
    """Submit a job when what it reads is there, interrupt it once, wait for its receipt."""
    for needed in needs:
        needed.result()
    options = [f"--job-name={bench.name}", "--mem=100M", "--output=%x-%j.log"]
    job_id = bench.call("sbatch", "--parsable", *options, PROJECT / "sbatch" / f"{job}.sbatch", "x.yaml").strip()
    if job in AT_START:
        _interrupt(bench, job_id, _soon(lambda: _listening(job_id, job), f"{job} has begun"))
    else:
        pid = int(bench.until(lambda: bench.rows(job), f"{job} has begun")[0]["pid"])
        _soon(lambda: _durable(bench, job), f"{job} has something durable")
        _interrupt(bench, job_id, pid)
    bench.finished(job, 300)


def _interrupt(bench: Bench, job_id: str, pid: int) -> None:
    """Send SIGUSR1, with the process held until it has arrived: a fast job would have finished by then."""
    os.kill(pid, signal.SIGSTOP)
    try:
        bench.signal(job_id)
        _soon(lambda: _has(pid, "ShdPnd", signal.SIGUSR1), f"the signal to job {job_id} has arrived")
    finally:
        os.kill(pid, signal.SIGCONT)


def _durable(bench: Bench, job: str) -> bool:
    """Whether a unit is in the journal, or training saved (which it does not do by itself so early, so the first step counts)."""
    return any(path.stat().st_size for folder in ("journal", "metrics") for path in (bench.state(job) / folder).glob("*.jsonl"))


def _listening(job_id: str, job: str) -> int | None:
    """The process of a job in that SLURM job, once its handler of SIGUSR1 stands."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            if not program.endswith(b"python") or job.encode() not in arguments:  # srun has the same arguments
                continue
            if f"SLURM_JOB_ID={job_id}".encode() not in (process / "environ").read_bytes().split(b"\0"):
                continue
        except OSError:
            continue  # it has ended
        pid = int(process.name)
        if _has(pid, "SigCgt", signal.SIGUSR1):
            return pid
    return None


def _has(pid: int, mask: str, number: signal.Signals) -> bool:
    """Whether a signal is in one of the masks of /proc/<pid>/status."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    value = next(line.split()[1] for line in lines if line.startswith(f"{mask}:"))
    return bool(int(value, 16) >> (number - 1) & 1)


def _soon(met: Callable[[], Value | None], what: str) -> Value:
    """``Bench.until``, looking every two milliseconds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := met():
            return value
        time.sleep(0.002)
    raise AssertionError(f"not within {PATIENCE_S:.0f} s: {what}")


def _start_undisturbed(bench: Bench) -> subprocess.Popen[str]:
    """The same experiment in one process, without SLURM, beside the drills (which mostly wait)."""
    root = bench.folder / "undisturbed"
    root.mkdir()
    env: dict[str, Any] = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env |= {"TRIBUNAL_ROOT": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tribunal.cluster", ",".join(JOBS), str(bench.folder / "x.yaml")]
    return subprocess.Popen(command, env=env, cwd=bench.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
