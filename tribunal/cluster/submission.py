"""Submit an experiment's jobs as a graph of dependent SLURM jobs, through submitit.

submitit writes the scripts, submits them and reads the ids back. What it starts is ours: ``run_job.py`` of the code snapshot, the
same program as by hand. Nothing is pickled, so signals are noted before anything heavy is imported, no class layout
has to survive the queue, and an array of 10,000 tasks needs one script instead of 10,000 pickles.

A dependent waits for its inputs' *receipts*: ``afterany`` only says when to look (``tribunal.cluster.gate`` looks).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tribunal.cluster import local, queue, snapshot
from tribunal.cluster.job import Job, root
from tribunal.cluster.launch import job_kind, make_job
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.pipelines import finished, jobs_of
from tribunal.cluster.prefetch import OFFLINE
from tribunal.cluster.publishing import STARTED, compare, probe_write
from tribunal.cluster.resources import Resources, parse_limit, resolve
from tribunal.cluster.site import profile, site_environment, site_value
from tribunal.core.config import Experiment
from tribunal.core.errors import ConfigError, UserError
from tribunal.core.storage import make_folder, read_json, write_atomic, write_json

FOLLOWERS = 5
"""Generations queued in advance where a job can neither requeue itself nor submit; one too many ends within a second."""


@dataclass(frozen=True)
class Planned:
    """One job to submit.

    Attributes:
        indices: the array elements to run, of ``resources.array``.
        parents: jobs of this plan that it waits for.
        after: ids, submitted earlier, that it waits for as well.
    """

    job: Job[Any]
    resources: Resources
    indices: tuple[int, ...]
    parents: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def array(self) -> bool:
        return self.resources.array > 1


@dataclass
class Plan:
    """What a submission will do.

    Attributes:
        skipped: (job, why nothing is submitted for it).
    """

    experiment: Experiment
    jobs: list[Planned] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def make_plan(experiment: Experiment, names: Sequence[str], queued: Mapping[str, Mapping[int | None, str]]) -> Plan:
    """Decide what to submit, and refuse what cannot work, before anything is queued.

    Args:
        names: jobs and pipelines.
        queued: ids of what is queued or running already, by job and shard (None: all of it).
    Raises:
        UserError: one line that names what is wrong and what to do.
    """
    wanted = [job for name in names for job in jobs_of(name)]
    plan = Plan(experiment)
    for name in sorted(dict.fromkeys(wanted), key=_depth):
        job = make_job(name, experiment)
        if finished(job):
            plan.skipped.append((name, "finished before"))
            continue
        resources = resolve(job)
        live = queued.get(name, {})
        left = {shard // resources.shards_each for shard in unfinished(job, resources.shards) if shard not in live and None not in live}
        indices = tuple(sorted(left))
        if not indices:
            why = f"queued already as {', '.join(sorted(set(live.values())))}" if live else "its shards are complete"
            plan.skipped.append((name, why))
            continue
        _refuse_changed(job)
        job.check()
        coming = {planned.job.name for planned in plan.jobs}
        after = []
        for needed in job.needs:
            if needed in coming or finished(make_job(needed, experiment)):
                continue
            if not queued.get(needed):
                raise UserError(
                    f"{name} reads the results of {needed}, which has neither finished nor is queued for experiment "
                    f"'{experiment.name}'; submit it as well: tribunal submit {experiment.path} {needed} {name}"
                )
            after += sorted(set(queued[needed].values()))
        plan.jobs.append(Planned(job, resources, indices, tuple(need for need in job.needs if need in coming), tuple(after)))
    return plan


def unfinished(job: Job[Any], shards: int) -> list[int]:
    """Shards without a marker that says that all their units are durable."""
    markers = {path.name for path in (job.state / "finished").glob("*.json")}
    left = [index for index in range(shards) if f"{index}-of-{shards}.json" not in markers]
    return left or [shards - 1]  # all complete but not published: one of them publishes


def check_site(plan: Plan) -> None:
    """Ask the controller whether partition, limit and account exist, and try the places where results go.

    Raises:
        ConfigError: one line per first fault, with what this site offers.
    """
    where = f"{plan.experiment.path}: slurm"
    partitions = queue.partitions()
    for planned in plan.jobs:
        asked = planned.resources.partition
        if asked is None or not partitions:
            continue
        for name in asked.split(","):
            if name not in partitions:
                raise ConfigError(
                    f"{where}.partition: {planned.job.name}: no partition '{name}' here; known: {', '.join(sorted(partitions))}"
                )
        limits = [partitions[name] for name in asked.split(",")]
        longest = max((parse_limit(limit, where) if limit != "infinite" else float("inf") for limit in limits), default=0)
        if planned.resources.limit_s > longest:
            raise ConfigError(
                f"{where}.time: {planned.job.name}: {planned.resources.limit_s // 60} minutes is more than partition '{asked}' allows "
                f"({', '.join(limits)}); ask for less: the job goes on in as many generations as it takes"
            )


def check_folders(experiment: Experiment) -> None:
    """Refuse now where results could not be written later."""
    for kind in ("checkpoints", "results"):
        probe_write(make_folder(root() / kind / experiment.name))


def chunks(planned: Planned, largest: int) -> list[tuple[int, list[int]]]:
    """(offset, array indices below ``largest``) of each sbatch call; the shard is index + offset."""
    groups: dict[int, list[int]] = {}
    for index in planned.indices:
        groups.setdefault(index // largest, []).append(index % largest)
    return [(group * largest, indices) for group, indices in sorted(groups.items())]


def index_list(indices: Sequence[int]) -> str:
    """The shortest form that sbatch reads: 0-7,9."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def start_command(planned: Planned, code: Path, experiment_file: Path) -> list[str]:
    """The command that runs one generation of a job."""
    return [sys.executable, "-u", str(code / snapshot.RUN_JOB), planned.job.name, str(experiment_file)]


def environment(code: Path, record: Path) -> dict[str, str]:
    """What every generation finds in its environment, wherever it runs."""
    site = {key: value for key, value in site_environment().items() if key.startswith(("HF_", "TORCH_HOME", "TRITON_"))}
    return {
        **site,
        **OFFLINE,
        "TRIBUNAL_ROOT": str(root().resolve()),
        "TRIBUNAL_SUBMISSION": str(record),
        **({"TRIBUNAL_DRILL": os.environ["TRIBUNAL_DRILL"]} if "TRIBUNAL_DRILL" in os.environ else {}),
        "PYTHONPATH": os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


class Sbatch:
    """One sbatch call: submitit's script around our command.

    Args:
        folder: the submission's folder; script and logs go below it.
        part: counts the arrays of a job that has more tasks than ``MaxArraySize``.
        array: the array indices; None for a single job.
        offset: added to the array index to get the shard.
    """

    def __init__(
        self, planned: Planned, folder: Path, code: Path, *, part: int = 0, array: Sequence[int] | None = None, offset: int = 0
    ) -> None:
        self.planned = planned
        self.folder = folder
        self.code = code
        self.array = array
        self.offset = offset
        job = planned.job
        self.name = f"{job.experiment.name}.{job.name}"
        self.script = folder / (f"{job.name}.sbatch" if part == 0 else f"{job.name}-{part + 1}.sbatch")
        self.logs = folder / "logs" / job.name

    def text(self) -> str:
        """The script."""
        command = start_command(self.planned, self.code, self.folder / "experiment.yaml")
        text: str = _executor(self)._make_submission_file_text(shlex.join(command), "")
        return text

    def shard(self) -> str:
        """Shell arithmetic, done by each task of the step, that says which shard it works on; empty where the job is not split."""
        asked = self.planned.resources
        if asked.shards == 1:
            return ""
        element = "SLURM_ARRAY_TASK_ID" + (f" + {self.offset}" if self.offset else "") if self.array is not None else "0"
        index = element if asked.shards_each == 1 else f"({element}) * {asked.shards_each} + SLURM_PROCID"
        return f' --shard "$(({index}))/{asked.shards}"'

    def submit(self, dependency: Sequence[str], known: Sequence[str] = ()) -> str:
        """Write and queue the script; returns the job's id.

        Args:
            dependency: ids to wait for.
            known: ids of earlier submissions of this very script.

        Raises:
            UserError: sbatch refused, with its reason.
        """
        write_atomic(self.script, self.text())
        make_folder(self.logs)
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = _executor(self)
        executor.dependency = list(dependency)
        try:
            job_id: str = executor._submit_command("").job_id
            return job_id
        except (FailedJobError, FailedSubmissionError) as error:
            accepted = queue.find_script(self.name, self.script, known=known)  # an answer that got lost is no refusal
            if accepted is None:
                raise UserError(f"sbatch refused {self.planned.job.name}: {queue.reason(str(error))}; script: {self.script}") from None
            return accepted
        finally:
            for copy in [*self.logs.glob(".submission_file_*"), *self.logs.glob("*_submission.sh")]:
                copy.unlink()  # submitit's; ours is beside the record

    def parameters(self) -> dict[str, Any]:
        """submitit's parameters for this job."""
        asked = self.planned.resources
        more: dict[str, Any] = {"signal": f"USR1@{asked.lead_s}", "requeue": True}
        for option in asked.extra:
            key, _, value = option.removeprefix("--").partition("=")
            more[key] = value or True
        if profile().get("route", "requeue") != "requeue":
            more["no-requeue"] = True  # it would be refused: a fresh sbatch, or the next of the chain, goes on
        if "no-requeue" in more:
            del more["requeue"]
        if self.array is not None:
            throttle = f"%{asked.throttle}" if asked.throttle else ""
            more["array"] = index_list(self.array) + throttle
        gres = asked.gres or "gpu"
        start = f'trap "" USR1; exec "$@"{self.shard()}'
        asks = {
            "job_name": self.name,
            "time": asked.minutes,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus,
            "mem": f"{asked.mem_gb}GB",
            "gres": f"{gres}:{asked.gpus}" if asked.gpus else None,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "exclude": asked.exclude,
            "mail_user": asked.mail,
            "mail_type": "END,FAIL" if asked.mail else None,
        }
        return {key: value for key, value in asks.items() if value is not None} | {
            "stderr_to_stdout": True,
            "wckey": None,
            # USR1 is ignored until Python's handlers stand: its default action would end an interpreter that is starting
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus}", "bash", "-c", start, "tribunal"],
            "setup": self._setup(),
            "additional_parameters": more,
        }

    def _setup(self) -> list[str]:
        modules = site_value("TRIBUNAL_MODULES")
        lines = [f"module load {modules}"] if modules else []
        values = environment(self.code, self.folder)
        lines += [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
        return lines


def _executor(sbatch: Sbatch) -> Any:
    """submitit's SlurmExecutor with our command and our script's name (imported late: it takes half a second)."""
    from submitit.slurm import slurm

    class Executor(slurm.SlurmExecutor):
        dependency: list[str] = []

        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no SLURM

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            submission_file_path.write_text(sbatch.script.read_text())
            wait = [f"--dependency=afterany:{':'.join(self.dependency)}"] if self.dependency else []
            return ["sbatch", *wait, str(sbatch.script)]

    executor = Executor(folder=sbatch.logs)
    parameters = sbatch.parameters()
    executor.parameters = {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}
    if sbatch.array is not None:
        executor.parameters["map_count"] = len(sbatch.array)
    return executor


def sbatches(planned: Planned, folder: Path, code: Path) -> list[Sbatch]:
    """The sbatch calls of one job: one, or several where it has more tasks than the site's arrays may have."""
    if not planned.array:
        return [Sbatch(planned, folder, code)]
    parts = chunks(planned, queue.max_array_size())
    return [Sbatch(planned, folder, code, part=part, array=indices, offset=offset) for part, (offset, indices) in enumerate(parts)]


def dry_run(plan: Plan) -> str:
    """The graph and every script, as they would be submitted; writes nothing."""
    folder = snapshot.submissions(plan.experiment.name).resolve() / "NNNN"
    code = snapshot.code_folder(plan.experiment.name).resolve()
    lines = ["# Dry run: nothing is submitted.", *(f"# {line}" for line in graph(plan, {}))]
    for planned in plan.jobs:
        for sbatch in sbatches(planned, folder, code):
            wait = [f"--dependency=afterany:{':'.join([*(f'<{parent}>' for parent in planned.parents), *planned.after])}"]
            command = " ".join(["sbatch", *(wait if planned.parents or planned.after else []), str(sbatch.script)])
            lines += ["", f"# ---- {command}", sbatch.text().rstrip()]
    return "\n".join(lines)


def graph(plan: Plan, ids: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per job: its tasks, its ids, what it waits for."""
    rows = []
    for planned in plan.jobs:
        asked = planned.resources
        each = f"{asked.tasks} task" + "s" * (asked.tasks > 1)
        tasks = f"{len(planned.indices)} of {asked.array} x {each}" if planned.array else each
        gpus = f"{asked.gpus * asked.nodes} GPU" if asked.gpus else "no GPU"
        waits = ", ".join([*planned.parents, *planned.after])
        rows.append(
            f"{planned.job.name:<22} {tasks:<16} {gpus:<7} {asked.minutes:>5} min  {' '.join(ids.get(planned.job.name, [])):<10} "
            + (f"after {waits}" if waits else "at once")
        )
    return rows + [f"{name:<22} nothing to do: {why}" for name, why in plan.skipped]


def submit_slurm(plan: Plan) -> dict[str, list[str]]:
    """Queue the plan; returns the ids by job. Where a call is refused, what was queued by this submission is cancelled.

    Raises:
        UserError: sbatch refused a job.
    """
    folder, code = prepare(plan)
    calls = {planned.job.name: sbatches(planned, folder, code) for planned in plan.jobs}
    for planned in plan.jobs:
        for sbatch in calls[planned.job.name]:
            write_atomic(sbatch.script, sbatch.text())
            if refusal := queue.test_only(sbatch.script):
                raise ConfigError(
                    f"{plan.experiment.path}: slurm ({planned.job.name}): sbatch would refuse it: {refusal}; nothing was queued"
                )
    record = new_record(plan, "slurm", code)
    ids: dict[str, list[str]] = {}
    for planned in plan.jobs:
        waits = [*(i for parent in planned.parents for i in ids[parent]), *planned.after]
        begin_again(planned.job)
        for sbatch in calls[planned.job.name]:
            chain: list[str] = []
            try:
                chain.append(sbatch.submit(waits))
                for _ in range(FOLLOWERS if profile().get("route") == "chain" else 0):
                    chain.append(sbatch.submit(chain[-1:], known=chain))
            except UserError as error:
                queued = [*(i for known in ids.values() for i in known), *chain]
                queue.cancel(queued)
                raise UserError(f"{error}" + (f". Cancelled again: {', '.join(queued)}" if queued else "")) from None
            ids.setdefault(planned.job.name, []).extend(chain)
            record["jobs"][planned.job.name] = _entry(planned, calls[planned.job.name][0], ids[planned.job.name], waits)
            write_json(folder / snapshot.RECORD, record)
    return ids


def submit_local(plan: Plan) -> dict[str, list[str]]:
    """Start the plan on this machine, in the background; returns the runner's name by job."""
    folder, code = prepare(plan)
    record = new_record(plan, "local", code)
    record["environment"] = environment(code, folder)
    name = f"local-{folder.name}"
    for planned in plan.jobs:
        begin_again(planned.job)
        asked = planned.resources
        sbatch = Sbatch(planned, folder, code)
        make_folder(sbatch.logs)
        record["jobs"][planned.job.name] = {
            **_entry(planned, sbatch, [name], []),
            "command": start_command(planned, code, folder / "experiment.yaml"),
            "parents": list(planned.parents),
            "local_indices": [index * asked.shards_each + rank for index in planned.indices for rank in range(asked.shards_each)],
            "throttle": asked.throttle,
            "cpus": asked.cpus,
            "lead_s": asked.lead_s,
            "gpus": asked.gpus // asked.tasks_per_node,
        }
    write_json(folder / snapshot.RECORD, record)
    local.start(folder, code)
    return {planned.job.name: [name] for planned in plan.jobs}


def prepare(plan: Plan) -> tuple[Path, Path]:
    """Make the submission's folder with the resolved experiment, and the code's; returns both."""
    check_folders(plan.experiment)
    folder = snapshot.new_submission(plan.experiment.name).resolve()
    code = snapshot.write_code(plan.experiment.name).resolve()
    lead_s = plan.jobs[0].resources.lead_s if plan.jobs else plan.experiment.slurm.signal_lead_s
    snapshot.write_experiment(plan.experiment, lead_s, folder / "experiment.yaml")
    return folder, code


def new_record(plan: Plan, cluster: str, code: Path) -> dict[str, Any]:
    """The part of submission.json that is known before anything is queued."""
    return {
        "schema_version": 1,
        "experiment": plan.experiment.name,
        "file": str(plan.experiment.path.resolve()),
        "cluster": cluster,
        "time": round(time.time(), 3),
        "cwd": str(Path.cwd()),
        "code": str(code),
        "commit": snapshot.commit_of_code(),
        "max_generations": plan.experiment.slurm.max_generations,
        "largest_array": queue.max_array_size() if any(planned.array for planned in plan.jobs) else None,
        "cancelled": None,
        "jobs": {},
    }


def begin_again(job: Job[Any]) -> None:
    """Give a job that was stopped, failed or cancelled a fresh budget."""
    ledger = Ledger(job.state / "generations.jsonl")
    if ledger.path.exists():
        ledger.note("resumed")


def _entry(planned: Planned, sbatch: Sbatch, ids: Sequence[str], waits: Sequence[str]) -> dict[str, Any]:
    asked = planned.resources
    return {
        "ids": list(ids),
        "shards": asked.shards,
        "shards_each": asked.shards_each,
        "indices": index_list(planned.indices) if planned.array else None,
        "gpus": asked.gpus * asked.nodes,
        "limit_s": asked.limit_s,
        "needs": list(planned.job.needs),
        "after": list(waits),
        "script": str(sbatch.script),
        "logs": str(sbatch.logs),
    }


def _refuse_changed(job: Job[Any]) -> None:
    """Refuse a configuration that the job would refuse on its first start (inputs that are still to come left out)."""
    path = job.state / STARTED
    if not path.exists():
        return
    mine, theirs = job.fingerprint(), read_json(path)
    coming = {name for name, digest in mine["inputs"].items() if digest is None}
    theirs["inputs"] = {name: None if name in coming else digest for name, digest in theirs.get("inputs", {}).items()}
    if differences := compare(theirs, mine):
        raise ConfigError(
            f"{job.state} was started with another configuration ({'; '.join(differences)}). "
            "Give the experiment another name to start a second run, or remove that folder to start over."
        )


def _depth(name: str) -> tuple[int, str]:
    """Longest way down the graph of needs, so that parents come first."""

    def depth(job: str) -> int:
        return 1 + max((depth(need) for need in job_kind(job).needs), default=0)

    return depth(name), name
