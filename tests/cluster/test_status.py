"""Status from the run's own files: what it says of each ending, and that 10,000 array tasks take about a second."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.project import Project
from tribunal.cluster import live, queue, status
from tribunal.cluster.resubmission import script_name

NOW = time.time()


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    folder = tmp_path / "checkpoints" / "big" / "count"
    (folder / "finished").mkdir(parents=True)
    return folder


def submitted(folder: Any, shards: int, **more: Any) -> None:
    record = folder.parent / "submissions" / "0001"
    record.mkdir(parents=True)
    entry = {"ids": ["77"], "shards": shards, "gpus": 2, "limit_s": 3600, "logs": str(record / "logs"), "needs": [], "after": []}
    about = {"cluster": "slurm", "time": NOW - 7200, "max_generations": 50, "cancelled": None, "largest_array": 1001}
    (record / "submission.json").write_text(json.dumps({**about, "experiment": "big", "jobs": {"count": {**entry, **more}}}))


def seen(*entries: queue.Entry, error: str | None = None) -> queue.Snapshot:
    return queue.Snapshot(entries, 3.0, error)


def pending(reason: str, index: str | None = None, dependency: str = "") -> queue.Entry:
    return queue.Entry("77", index, "77", "PENDING", reason, "2026-01-01T10:00:00", "big.count", "x.sbatch", dependency)


def events(shard: str, epoch: int, **end: Any) -> list[dict[str, Any]]:
    about = {"shard": shard, "epoch": epoch}
    start = {"event": "start", **about, "host": "n1", "pid": 1, "job": "77", "restarts": epoch - 1, "gpus": 2, "time": NOW - 1000}
    lines = [start, {"event": "work", **about, "done": 3 * (epoch - 1), "total": 9, "unit": "trace", "time": NOW - 990}]
    if end:
        decided = {name: end.pop(name) for name in ("next", "why") if name in end}
        lines.append({"event": "end", **about, "cause": "time limit", "seconds": 900.0, "units": 3, "time": NOW - 100, **end})
        lines.append({"event": "decided", **about, **decided, "time": NOW - 100})
    return lines


def ledger(folder: Any, lines: list[dict[str, Any]]) -> None:
    (folder / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def one(folder: Any, snapshot: queue.Snapshot | None = None) -> status.Row:
    report = status.report("big", snapshot or seen())
    assert len(report.rows) == 1
    return report.rows[0]


@pytest.mark.parametrize(
    ("end", "state", "why"),
    [
        ({"next": "nothing", "why": "failed: ValueError: bad layer (probe.py:7)", "cause": "failed"}, "failed", "ValueError: bad layer"),
        ({"next": "nothing", "why": "exhausted: 50 generations of at most 50"}, "exhausted", "50 generations of at most 50"),
        ({"next": "nothing", "why": "no progress: 2 generations in a row"}, "no progress", "2 generations in a row"),
        ({"next": "nothing", "why": "cancelled", "cause": "cancelled"}, "cancelled", "to go on: tribunal resume big"),
        ({"next": "by hand", "why": "to go on: sbatch x.sbatch"}, "stopped", "to go on: sbatch x.sbatch"),
        ({"next": "requeue", "why": "time limit"}, "lost", "asked to be started again (requeue), but is not in the queue"),
    ],
)
def test_each_ending_is_told_apart_when_slurm_has_forgotten_the_job(run_folder, end, state, why):
    submitted(run_folder, 1)
    ledger(run_folder, [*events("0-of-1", 1, next="requeue", why="time limit"), *events("0-of-1", 2, **end)])
    row = one(run_folder)
    assert row.state == state and why in row.why
    assert (row.done, row.total, row.unit, row.generation, row.max_generations) == (6, 9, "trace", 2, 50)
    assert row.gpu_hours == pytest.approx(2 * 1800 / 3600)


@pytest.mark.parametrize(
    ("reason", "dependency", "why"),
    [
        ("BeginTime", "", "waits until 2026-01-01 10:00:00: a requeued job starts again after a pause"),
        ("Dependency", "afterany:76(unfulfilled)", "waits for job (76)"),
        ("DependencyNeverSatisfied", "", "waits for a job that ended in a way its dependency excludes"),
        ("JobHeldUser", "", "held: scontrol release 77"),
        ("JobHoldMaxRequeue", "", "requeued it too often after node failures; scontrol release 77"),
        ("Resources", "", "waits for free nodes"),
        ("AssocMaxJobsLimit", "", "AssocMaxJobsLimit"),
    ],
)
def test_a_waiting_job_says_why(run_folder, reason, dependency, why):
    submitted(run_folder, 1)
    row = one(run_folder, seen(pending(reason, dependency=dependency)))
    assert row.state == "waiting" and why in row.why


def test_a_killed_job_is_not_taken_for_a_running_one_and_unknown_is_not_gone(run_folder):
    submitted(run_folder, 1)
    ledger(run_folder, events("0-of-1", 1))
    row = one(run_folder)
    assert row.state == "killed" and "ended without a word on n1" in row.why and "; to go on: tribunal resume big (log: " in row.why
    assert one(run_folder, seen(error="no answer")).state == "unknown"


def test_a_killed_job_that_was_submitted_by_hand_goes_on_by_hand(run_folder):
    ledger(run_folder, events("0-of-1", 1))
    assert one(run_folder).why.endswith("to go on: the same sbatch again")


def test_a_heartbeat_shows_progress_without_slurm(run_folder):
    submitted(run_folder, 1)
    ledger(run_folder, events("0-of-1", 1))
    lease = run_folder / "leases" / "0-of-1"
    lease.mkdir(parents=True)
    facts = {"phase": "running", "done": 5, "total": 9, "unit": "trace", "rate": 0.5}
    (lease / "epoch-000001.json").write_text(json.dumps({"released": False, "facts": facts}))
    row = one(run_folder, seen(error="no answer"))
    assert (row.state, row.done, row.rate, row.eta_s) == ("running", 5, 0.5, 8.0)
    assert one(run_folder).state == "running", "the heartbeat is younger than SLURM's answer"
    assert one(run_folder, replace(seen(), age_s=-1.0)).state == "killed", "SLURM has been asked since, and knows of no such job"


def test_a_continuation_speaks_for_each_of_its_shards(run_folder):
    submitted(run_folder, 4)
    script = str(run_folder / script_name(range(2, 4), 4))
    entry = queue.Entry("78", None, "78", "PENDING", "Priority", "2026-01-01T10:00:00", "big.count", script, "")
    assert [(row.state, row.id) for row in status.report("big", seen(entry)).rows][2:] == [("waiting", "78")] * 2
    assert set(live.tasks("big", seen(entry))["count"]) == {2, 3}
    alone = replace(entry, script=str(run_folder / script_name(range(1), 1)))
    assert set(live.tasks("big", seen(alone))["count"]) == {None}


def test_an_array_line_of_squeue_speaks_of_each_of_its_tasks():
    assert pending("Priority", "[3-5,9%2]").indices() == [3, 4, 5, 9]
    assert pending("Priority", "7").indices() == [7]
    assert pending("Priority").indices() is None


def test_shards_of_the_second_array_are_counted_on(run_folder):
    submitted(run_folder, 1500)
    script = str(run_folder.parent / "submissions" / "0001" / "count-2.sbatch")
    entry = queue.Entry("78", "0-498", "78", "PENDING", "Priority", "N/A", "big.count", script, "")
    assert sorted(live.tasks("big", seen(entry))["count"]) == list(range(1001, 1500))


def test_10000_array_tasks_are_told_in_about_a_second_from_few_files(run_folder):
    """A third finished, a third between two generations, 300 running with a heartbeat each, the rest waiting."""
    shards = 10_000
    submitted(run_folder, shards)
    lines = []
    for index in range(shards):
        name = f"{index}-of-{shards}"
        if index % 3 == 0:
            lines += events(name, 1, next="nothing", why="finished", cause="finished")
            (run_folder / "finished" / f"{name}.json").touch()
        elif index % 3 == 1:
            lines += events(name, 1, next="requeue", why="time limit")
        elif index < 900:
            lines += events(name, 1)
            lease = run_folder / "leases" / name
            lease.mkdir(parents=True)
            facts = {"phase": "running", "done": 1, "total": 9, "unit": "trace", "rate": 0.5}
            (lease / "epoch-000001.json").write_text(json.dumps({"released": False, "facts": facts}))
    ledger(run_folder, lines)
    queued = [pending("BeginTime", str(index)) for index in range(1, shards, 3)]
    queued += [replace(pending("None", str(index)), state="RUNNING") for index in range(2, 900, 3)]
    queued.append(pending("Priority", ",".join(str(index) for index in range(902, shards, 3)) + "%256"))
    began = time.process_time()
    report = status.report("big", seen(*queued))
    text = status.table(report)
    took = time.process_time() - began
    assert len(text.splitlines()) == shards + 2
    assert "3334 complete, 300 running, 6366 waiting" in text
    assert took < 2.0, f"{took:.2f} s"


def test_status_of_nothing_names_what_there_is(tmp_path):
    project = Project(tmp_path)
    result = project.tribunal("status", "nonesuch", check=2)
    assert "nothing of experiment 'nonesuch'" in result.stderr and len(result.stderr.splitlines()) == 1
