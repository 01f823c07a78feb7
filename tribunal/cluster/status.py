"""What every job and shard of an experiment is doing, how far it is, and why it is not running.

Read from the run's own files (one ledger per job, one listing of finished shards, the heartbeat of those that run) and one cached
answer of squeue, so it still answers when SLURM has forgotten a job or is away. sacct is never asked.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tribunal.cluster import live, local, queue, snapshot
from tribunal.cluster.job import root
from tribunal.cluster.ledger import Ledger
from tribunal.core import receipts
from tribunal.core.errors import UserError
from tribunal.core.storage import read_json

STILL_S = 90.0
"""A heartbeat older than this (nine beats missed) belongs to nobody that runs."""
SETTLE_S = 60.0
"""So long may a requeued job be missing from an answer of squeue that may be 30 s old."""
ENDED = ("failed", "exhausted", "no progress", "cancelled", "stopped", "killed", "lost", "not started")


@dataclass
class Row:
    """One shard of a job (``shard`` is None for a job that is not split, or that has finished)."""

    job: str
    shard: int | None
    shards: int
    state: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    rate: float | None = None
    eta_s: float | None = None
    generation: int = 0
    max_generations: int | None = None
    gpu_hours: float = 0.0
    id: str | None = None
    why: str = ""
    log: str | None = None


@dataclass
class Report:
    """An experiment's rows, and what SLURM had to say."""

    experiment: str
    rows: list[Row]
    queue_age_s: float
    queue_error: str | None

    def as_json(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {"experiment": self.experiment, "queue_age_s": round(self.queue_age_s, 1), "queue_error": self.queue_error, "rows": rows}


def experiments() -> list[str]:
    """Names with state or results, most recently touched last."""
    found: dict[str, float] = {}
    for kind in ("results", "checkpoints"):
        folder = root() / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.name.startswith("."):
                found[path.name] = max(found.get(path.name, 0), path.stat().st_mtime)
    return sorted(found, key=lambda name: found[name])


def name_of(text: str) -> str:
    """An experiment's name, from its name or its file.

    Raises:
        UserError: nothing of that name has been started or submitted.
    """
    name = text
    if text.endswith((".yaml", ".yml")):
        from tribunal.core.config import load_experiment

        name = load_experiment(text).name
    if not any((root() / kind / name).is_dir() for kind in ("checkpoints", "results")):
        known = ", ".join(experiments()) or "none"
        raise UserError(f"nothing of experiment '{name}' under {root()}; known: {known} (TRIBUNAL_ROOT says where to look)")
    return name


def report(experiment: str, seen: queue.Snapshot | None = None) -> Report:
    """Every job and shard of an experiment."""
    seen = queue.read() if seen is None else seen
    records = snapshot.records(experiment)
    tasks = live.tasks(experiment, seen, records)
    submitted: dict[str, dict[str, Any]] = {}
    for record in records:
        for job, entry in record["jobs"].items():
            about = {name: record[name] for name in ("max_generations", "time", "cluster", "cancelled", "folder")}
            submitted[job] = {**entry, **about}
    names = _jobs(experiment, submitted)
    rows = [row for job in names for row in _job_rows(experiment, job, submitted.get(job), tasks.get(job, {}), seen)]
    by_slurm = any(entry["cluster"] == "slurm" for entry in submitted.values()) or not submitted
    return Report(experiment, rows, seen.age_s, seen.error if by_slurm else None)


def unfinished(experiment: str) -> dict[str, str]:
    """In words, what each job that was begun or submitted and has not finished is doing."""
    said: dict[str, list[str]] = defaultdict(list)
    for row in report(experiment, queue.read(fresh=True)).rows:
        if row.state in ("finished", "stale"):
            continue
        shard = "" if row.shard is None else f"shard {row.shard} of {row.shards} "
        units = "" if row.done is None else f", {row.done} of {row.total if row.total is not None else '?'} {row.unit or 'unit'}s"
        why = row.why.partition("; tribunal resume")[0]
        said[row.job].append(f"{shard}{row.state}{units}{f' ({why})' if why else ''}")
    return {job: "; ".join(words[:4]) + ("; ..." if len(words) > 4 else "") for job, words in said.items()}


def _jobs(experiment: str, submitted: Mapping[str, Any]) -> list[str]:
    from tribunal.cluster.launch import job_kind
    from tribunal.core import registry

    known = set(registry.names("jobs"))
    found = {path.parent.name for path in (root() / "checkpoints" / experiment).glob("*/generations.jsonl")}
    found |= {path.parent.name for path in (root() / "results" / experiment).glob(f"*/{receipts.RECEIPT}")}

    def depth(job: str) -> int:
        return 1 + max((depth(need) for need in job_kind(job).needs), default=0) if job in known else 99

    return sorted({*found, *submitted}, key=lambda job: (depth(job), job))


def _job_rows(
    experiment: str, job: str, entry: dict[str, Any] | None, tasks: Mapping[int | None, live.Task], seen: queue.Snapshot
) -> list[Row]:
    receipt = receipts.read_receipt(root() / "results" / experiment / job)
    most = entry["max_generations"] if entry else None
    if receipt is not None:
        return [_finished(experiment, job, receipt, most)]
    state = root() / "checkpoints" / experiment / job
    ledger = Ledger(state / "generations.jsonl")
    starts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for start in ledger.generations():
        starts[start["shard"]].append(start)
    shards = entry["shards"] if entry else max((int(shard.partition("-of-")[2]) for shard in starts), default=1)
    folder = state / "finished"
    markers = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    rows = []
    for index in range(shards):
        name = f"{index}-of-{shards}"
        task = tasks.get(index if shards > 1 else None)
        row = Row(job, index if shards > 1 else None, shards, "", max_generations=most)
        _fill(row, starts.get(name, []), entry)
        if f"{name}.json" in markers:
            row.state, row.why = "complete", "its units are all there; the job waits for its other shards" if shards > 1 else ""
            row.rate = row.eta_s = None
        else:
            _judge(experiment, row, state / "leases" / name, starts.get(name, []), task, entry, seen)
        rows.append(row)
    return rows


def _finished(experiment: str, job: str, receipt: Mapping[str, Any], most: int | None) -> Row:
    generations = receipt["generations"]
    units = receipt["totals"]["units"]
    shards = {row["shard"] for row in generations}
    row = Row(job, None, len(shards) or 1, "finished", done=units, total=units, max_generations=most)
    row.unit = next((start["unit"] for start in generations if start.get("unit")), None)
    row.generation = max((sum(start["shard"] == shard for start in generations) for shard in shards), default=0)
    row.gpu_hours = sum((start["seconds"] or 0) * (start.get("gpus") or 0) for start in generations) / 3600
    if why := receipts.stale(job, lambda name: receipts.read_receipt(root() / "results" / experiment / name)):
        cure = "run it again" if _reads_all(job) else "remove its results folder to make it anew"
        row.state, row.why = "stale", f"{why}; {cure}"
    return row


def _reads_all(job: str) -> bool:
    from tribunal.cluster.launch import job_kind
    from tribunal.core import registry

    return job in registry.names("jobs") and job_kind(job).reads_all


def _fill(row: Row, starts: Sequence[Mapping[str, Any]], entry: Mapping[str, Any] | None) -> None:
    """Units, rate, generations and GPU-hours from the ledger."""
    row.generation = sum(not start["before_resume"] for start in starts)
    now = time.time()
    for start, following in zip(starts, [*starts[1:], None]):
        if start["done"] is not None:
            row.done, row.total, row.unit = start["done"] + (start["units"] or 0), start["total"], start["unit"]
        seconds = start["seconds"]
        if seconds is None:  # killed, or still running
            seconds = (following["started"] if following else now) - start["started"]
            seconds = min(seconds, entry["limit_s"] if entry else seconds)
        elif start["units"] and seconds > 0:
            row.rate = start["units"] / seconds
        gpus = start["gpus"] if start["gpus"] is not None else (entry["gpus"] if entry else 0)
        row.gpu_hours += seconds * gpus / 3600
    if row.rate and row.total is not None and row.done is not None:
        row.eta_s = (row.total - row.done) / row.rate


def _judge(
    experiment: str,
    row: Row,
    lease: Path,
    starts: Sequence[Mapping[str, Any]],
    task: live.Task | None,
    entry: Mapping[str, Any] | None,
    seen: queue.Snapshot,
) -> None:
    """State and reason of a shard that is not complete."""
    last = starts[-1] if starts else None
    told = None if last is None or last["job"] is None else time.time() - seen.age_s
    if last is not None and last["ended"] is None and _running(row, lease, task, told):
        row.state, row.id = "running", task.id if task else None
        return
    if task is not None:
        row.id, row.why = task.id, task.why
        row.state = "waiting" if task.state == "PENDING" else "starting" if task.state == "RUNNING" else task.state.lower()
        return
    row.log = _log(row, last, entry)
    command = f"tribunal resume {experiment}" if entry else "the same sbatch again"
    again = f"; to go on: {command}" + (f" (log: {row.log})" if row.log else "")
    by_slurm = last["job"] is not None if last is not None else entry is None or entry["cluster"] == "slurm"
    open_end = last is None or last["ended"] is None or last["next"] in ("requeue", "sbatch", "local")
    if last is None and entry is not None and entry["cancelled"]:
        row.state, row.why = "cancelled", f"before it started{again}"
    elif by_slurm and open_end and seen.error is not None:
        row.state, row.why = "unknown", "SLURM does not answer, and the run's own files do not tell"
    elif last is None:
        gone = "left the queue before it started" if entry else "never submitted"
        if entry is not None and entry["cluster"] == "slurm" and time.time() - entry["time"] < SETTLE_S:
            row.state, row.why = "waiting", "just submitted"
        else:
            row.state, row.why = "not started", f"{gone}{again}"
    elif last["ended"] is None:
        row.state, row.why = "killed", f"ended without a word on {last['host']} (all of it killed: out of memory, node lost?){again}"
    elif last["next"] in ("requeue", "sbatch", "local"):
        if time.time() - last["ended"] < SETTLE_S:
            row.state, row.why = "waiting", "has just asked to be started again"
        else:
            row.state, row.why = "lost", f"asked to be started again ({last['next']}), but is not in the queue{again}"
    else:
        why = last["why"] or last["error"] or last["cause"]
        row.state = next((word for word in ENDED if why.startswith(word)), "failed" if last["cause"] == "failed" else "stopped")
        if last["cause"] in ("terminated", "cancelled"):
            row.state = "cancelled"
        row.why = why.removeprefix(f"{row.state}: ") + again


def _running(row: Row, lease: Path, task: live.Task | None, told: float | None) -> bool:
    """Whether the shard's process gives signs of life; takes its own word on how far it is.

    Args:
        told: when SLURM last said what runs (seconds since the epoch); None for a process that it knows nothing of.
    """
    newest = max(lease.glob("epoch-*.json"), default=None)
    if newest is None:
        return False
    try:
        holder, beat = read_json(newest), newest.stat()
    except (UserError, OSError):
        return task is not None and task.state == "RUNNING"  # replaced while we looked
    age_s = time.time() - beat.st_mtime
    # asked since the last heartbeat, SLURM did not name it; it was asked for this user's jobs alone
    gone = task is None and told is not None and beat.st_mtime < told and beat.st_uid == os.getuid()
    if holder.get("released") or gone or (age_s > STILL_S and (task is None or task.state != "RUNNING")):
        return False
    facts = holder.get("facts", {})
    if facts.get("done") is not None:
        row.done, row.total, row.unit = facts["done"], facts["total"], facts["unit"]
        row.rate = facts["rate"] or row.rate
        row.eta_s = (row.total - row.done) / row.rate if row.rate and row.total is not None and row.done is not None else None
    else:
        row.why = facts.get("phase", "")
    if age_s > STILL_S:
        row.why = f"no heartbeat for {age_s:.0f} s"
    return True


def _log(row: Row, last: Mapping[str, Any] | None, entry: Mapping[str, Any] | None) -> str | None:
    """The file that the shard's last start wrote to; looked for only where it is going to be shown."""
    if entry is None or last is None:
        return None
    if entry["cluster"] == "local":
        state = local.read_state(Path(entry["folder"])) or {"tasks": {}}
        return state["tasks"].get(f"{row.job}/{row.shard or 0}", {}).get("log")
    pattern = f"*_{row.shard}_0_log.out" if row.shard is not None else "*_0_log.out"
    found = sorted(Path(entry["logs"]).glob(pattern), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else str(entry["logs"])


def table(report: Report) -> str:
    """The report as plain text: one line per job and shard."""
    head = ("job", "shard", "state", "units", "rate", "left", "start", "GPU-h", "why")
    lines: list[tuple[str, ...]] = [head]
    for row in report.rows:
        of = "" if row.done is None else f"{row.done}/{row.total if row.total is not None else '?'} {row.unit or 'unit'}s"
        most = f"{row.generation} of {row.max_generations}" if row.max_generations else str(row.generation)
        rate = f"{row.rate:.3g}/s" if row.rate and row.state == "running" else ""
        left = clock(row.eta_s) if row.eta_s is not None and row.state == "running" else ""
        shard = "" if row.shard is None else f"{row.shard}/{row.shards}"
        why = " ".join(part for part in (row.why, f"[{row.id}]" if row.id else "") if part)
        lines.append((row.job, shard, row.state, of, rate, left, most, f"{row.gpu_hours:.2f}" if row.gpu_hours else "", why))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    text = ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip() for line in lines]
    hours = sum(row.gpu_hours for row in report.rows)
    about = f"{report.experiment}: {summary(report.rows)}" + (f", {hours:.2f} GPU-hours" if hours else "")
    if report.queue_error:
        about += f"\nSLURM does not answer ({report.queue_error}); what follows comes from the run's own files"
    return "\n".join([about, *text])


def summary(rows: Sequence[Row]) -> str:
    """How many jobs and shards are in which state."""
    states: dict[str, int] = defaultdict(int)
    for row in rows:
        states[row.state] += 1
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "nothing submitted"


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
