"""Which of an experiment's tasks are queued or running now, by SLURM's word or the local runner's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tribunal.cluster import local, queue, snapshot
from tribunal.cluster.job import root
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.resubmission import shards_of_script


class Task(NamedTuple):
    """A queued or running task of a job.

    Attributes:
        id: to use in commands.
        state: as squeue names it (PENDING, RUNNING, COMPLETING, ...).
        why: why it is not running, for a person; empty where it runs.
    """

    id: str
    state: str
    why: str


Tasks = dict[str, dict[int | None, Task]]
"""By job and shard; None stands for a job that is not split."""

EXPLAINED = {
    "BeginTime": "waits until {start}: a requeued job starts again after a pause that the site sets",
    "Dependency": "waits for {parents}",
    "DependencyNeverSatisfied": "waits for a job that ended in a way its dependency excludes; tribunal cancel, then tribunal resume",
    "JobHeldUser": "held: scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held: SLURM requeued it too often after node failures; scontrol release {id}",
    "launch failed requeued held": "held after a failed launch; look at the node, then scontrol release {id}",
    "Resources": "waits for free nodes (next in line; expected {start})",
    "Priority": "waits in line behind other jobs (expected {start})",
    "JobArrayTaskLimit": "waits for its siblings (slurm.array_throttle)",
    "PartitionTimeLimit": "asks for more time than the partition allows; lower slurm.time",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "a node it asks for is not available (maintenance?)",
}


def tasks(experiment: str, seen: queue.Snapshot, records: Sequence[dict[str, Any]] | None = None) -> Tasks:
    """What of an experiment is queued or running, from one answer of squeue and the local runners' files."""
    records = snapshot.records(experiment) if records is None else records
    found: Tasks = {}
    _add_slurm(found, experiment, seen, records)
    _add_local(found, records)
    return found


def queued(experiment: str) -> dict[str, dict[int | None, str]]:
    """Ids of what is queued or running, asked for now, for whoever is about to submit."""
    seen = queue.read(fresh=True)
    return {job: {shard: task.id for shard, task in shards.items()} for job, shards in tasks(experiment, seen).items()}


def _add_slurm(found: Tasks, experiment: str, seen: queue.Snapshot, records: Sequence[dict[str, Any]]) -> None:
    ours = str((root() / "checkpoints" / experiment).resolve())
    prefix = f"{experiment}."
    names = {entry.id: entry.name for entry in seen.entries} | {entry.array: entry.name for entry in seen.entries}
    by_id = _ids_in_ledgers(experiment) if any(not entry.name.startswith(prefix) for entry in seen.entries) else {}
    for entry in seen.entries:
        if entry.name.startswith(prefix):
            job = entry.name.removeprefix(prefix)
            if f"/checkpoints/{experiment}/" in entry.script and not entry.script.startswith(ours):
                continue  # an experiment of the same name under another root
        elif entry.id in by_id:
            job = by_id[entry.id][0]
        else:
            continue
        task = Task(entry.own_id, entry.state, explain(entry, names, prefix))
        indices = entry.indices()
        shards = found.setdefault(job, {})
        each = _shards_each(entry.script, job, records)
        if indices is not None:
            offset = _offset(entry.script, job, records)
            for index in indices:
                for rank in range(each):
                    _put(shards, (index + offset) * each + rank, task._replace(id=f"{entry.array}_{index}"))
        elif each > 1:
            for rank in range(each):
                _put(shards, rank, task)
        elif (continued := shards_of_script(entry.script)) is not None:
            for shard in continued:
                _put(shards, shard, task)
        elif entry.id in by_id and by_id[entry.id][1] is not None:
            _put(shards, by_id[entry.id][1], task)
        else:
            _put(shards, None, task)


def _put(shards: dict[int | None, Task], shard: int | None, task: Task) -> None:
    """Of several tasks for one shard (a chain queued in advance), the one that runs, else the first."""
    known = shards.get(shard)
    if known is None or (known.state == "PENDING" and task.state != "PENDING"):
        shards[shard] = task


def explain(entry: queue.Entry, names: dict[str, str], prefix: str) -> str:
    """Why a task is not running; empty where it runs."""
    if entry.state != "PENDING":
        return "" if entry.state == "RUNNING" else entry.state.lower()
    parents = ", ".join(f"{names.get(i, 'job').removeprefix(prefix)} ({i})" for i in re.findall(r"after\w*:(\d+)", entry.dependency))
    reason = entry.reason.split(",")[0]
    text = EXPLAINED.get(reason, reason)
    return text.format(start=entry.start.replace("T", " "), id=entry.own_id, parents=parents or entry.dependency)


def _offset(script: str, job: str, records: Sequence[dict[str, Any]]) -> int:
    match = re.fullmatch(rf"{re.escape(job)}-(\d+)\.sbatch", Path(script).name)
    if match is None:
        return 0
    size = next((record["largest_array"] for record in records if record["folder"] == str(Path(script).parent)), queue.DEFAULT_ARRAY)
    return (int(match[1]) - 1) * (size or queue.DEFAULT_ARRAY)


def _shards_each(script: str, job: str, records: Sequence[dict[str, Any]]) -> int:
    """Shards of one array element of a submitted script: one per task."""
    mine = (record["jobs"].get(job, {}) for record in records if record["folder"] == str(Path(script).parent))
    return next((int(entry.get("shards_each", 1)) for entry in mine), 1)


def _ids_in_ledgers(experiment: str) -> dict[str, tuple[str, int | None]]:
    """SLURM's ids of starts, with job and shard: finds jobs that were submitted by hand under another name."""
    found: dict[str, tuple[str, int | None]] = {}
    for path in (root() / "checkpoints" / experiment).glob("*/generations.jsonl"):
        for row in Ledger(path).generations():
            if row["job"]:
                index, _, count = row["shard"].partition("-of-")
                found[row["job"]] = (path.parent.name, int(index) if int(count) > 1 else None)
    return found


def _add_local(found: Tasks, records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        if record["cluster"] != "local":
            continue
        folder = Path(record["folder"])
        state = local.read_state(folder)
        if state is None or not local.alive(folder):
            continue
        for name, task in state["tasks"].items():
            job, _, index = name.rpartition("/")
            if task["state"] in ("waiting", "running"):
                shard = int(index) if record["jobs"][job]["shards"] > 1 else None
                why = "waits for its turn on this machine" if task["state"] == "waiting" else ""
                name = f"local-{folder.name}" + (f" (process {task['pid']})" if "pid" in task else "")
                found.setdefault(job, {})[shard] = Task(name, {"waiting": "PENDING", "running": "RUNNING"}[task["state"]], why)
