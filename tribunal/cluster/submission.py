"""Submit a plan as a graph of dependent jobs, to SLURM or to this machine, and keep a record beside the state.

A dependent waits for its inputs' *receipts*: ``afterany`` only says when to look (``tribunal.cluster.waiting`` looks).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.cluster import local, queue, snapshot
from tribunal.cluster.job import Job
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.plan import Plan, Planned, check_folders
from tribunal.cluster.scripts import Sbatch, environment, index_list, sbatches, start_command
from tribunal.cluster.site import profile
from tribunal.core.errors import ConfigError, UserError
from tribunal.core.storage import make_folder, write_atomic, write_json

FOLLOWERS = 5
"""Generations queued in advance where a job can neither requeue itself nor submit; one too many ends within a second."""


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
