"""A job told to stop by a signal saves, resubmits itself once and resumes; told to stop for good, it stays stopped."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.slurm.bench import Bench


def count(bench: Bench, **values: object) -> None:
    bench.sections["count"] = {"units": 40, "seconds": 0.05, **values}


def gate(bench: Bench, unit: int) -> object:
    """A file that a unit waits for."""
    return {str(unit): bench.folder / "gate"}


def test_usr1_saves_requeues_once_and_the_same_job_resumes(bench: Bench) -> None:
    count(bench, wait_for=gate(bench, 20))
    job = bench.submit("count")
    bench.running("count", 20)
    bench.signal(job)
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    (bench.folder / "gate").touch()
    receipt = bench.whole("count", units=40, generations=2)
    assert bench.causes(receipt) == ["asked", "finished"]
    assert [row["units"] for row in receipt["generations"]] == [20, 20]
    assert {row["job"] for row in receipt["generations"]} == {job}
    assert "Restarts=1 " in bench.facts(job)
    log = (bench.folder / f"{bench.name}-{job}.log").read_text()
    assert log.count("=== x/count: generation") == 2, "one banner per generation, and the first not overwritten"
    assert "20 numbers done before" in log and "since the last stop (asked)" in log


def test_term_5_ms_after_usr1_does_not_end_the_requeue(bench: Bench) -> None:
    count(bench, wait_for=gate(bench, 20))
    job = bench.submit("count")
    bench.running("count", 20)
    bench.call("sh", "-c", f"scancel -s USR1 {job}; sleep 0.005; scancel -s TERM {job}")
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=2)


@pytest.mark.parametrize("signals", ["50 USR1 in a second", "TERM 5 ms after USR1"])
def test_signals_while_a_save_is_written_let_it_end_and_requeue_once(bench: Bench, signals: str) -> None:
    bench.slurm["save_every_s"] = 0.5
    bench.sections["walk"] = {"steps": 4, "seconds": 0.3, "save_seconds": 4}
    job = bench.submit("walk")
    states = bench.state("walk") / "states" / "walk"
    unfinished = bench.until(lambda: next(states.glob("tmp-*"), None), "a save has begun")
    if signals.startswith("50"):
        group = os.getpgid(bench.rows("walk")[0]["pid"])
        for _ in range(50):
            os.killpg(group, signal.SIGUSR1)
            time.sleep(0.02)
    else:
        bench.call("sh", "-c", f"scancel -s USR1 {job}; sleep 0.005; scancel -s TERM {job}")
    assert unfinished.exists(), "the signals were meant to come while it was written"
    bench.until(lambda: any(states.glob("000001-00000001/manifest.json")), "the save ends whole", 60)
    receipt = bench.whole("walk", units=4, generations=2)
    assert bench.causes(receipt) == ["asked", "finished"]
    assert [row["next"] for row in receipt["generations"]] == ["requeue", None]
    assert "Restarts=1 " in bench.facts(job)


def test_a_signal_during_import_loses_nothing_and_resubmits(bench: Bench) -> None:
    count(bench, slow_import=bench.folder / "importing")
    job = bench.submit("count")
    bench.until((bench.folder / "importing").exists, "the import has begun")
    bench.signal(job)
    bench.until(lambda: "asked to stop (SIGUSR1)" in bench.logs(), "the signal has come")
    (bench.folder / "importing").unlink()
    bench.until((bench.folder / "importing").exists, "the second generation's import has begun")
    (bench.folder / "importing").unlink()
    receipt = bench.whole("count", units=40, generations=2)
    assert [row["units"] for row in receipt["generations"]] == [0, 40]


def test_scancel_saves_and_stays_cancelled(bench: Bench) -> None:
    count(bench, wait_for=gate(bench, 20))
    job = bench.submit("count")
    bench.running("count", 20)
    bench.call("scancel", job)
    bench.gone()
    until = time.monotonic() + 10  # longer than a requeued job waits (6 s)
    while time.monotonic() < until:
        assert not bench.queue(), "cancelled by its owner, and back in the queue"
        time.sleep(1)
    assert "JobState=CANCELLED" in bench.facts(job)
    (row,) = bench.rows("count")
    assert (row["cause"], row["next"], row["units"]) == ("cancelled", "nothing", 20)
    (bench.folder / "gate").touch()
    bench.submit("count")
    bench.whole("count", units=40, generations=2)


def test_a_finished_job_that_is_requeued_ends_at_once(bench: Bench) -> None:
    count(bench, units=4)
    job = bench.submit("count")
    bench.finished("count")
    bench.gone()
    before = (bench.results("count") / "receipt.json").read_bytes()
    bench.call("scontrol", "requeue", job)
    bench.until(lambda: bench.queue(), "requeued")
    bench.gone()
    assert (bench.results("count") / "receipt.json").read_bytes() == before
    assert "count: finished before" in bench.logs()
    facts = bench.facts(job)
    assert "JobState=COMPLETED" in facts and "ExitCode=0:0" in facts


def test_an_array_task_is_interrupted_and_its_siblings_stay_untouched(bench: Bench) -> None:
    count(bench, units=60, wait_for=gate(bench, 44))
    job = bench.submit("count", "--array=0-2")
    bench.until(lambda: len(bench.rows("count")) == 3 and bench.units("count") >= 54, "the two others are done")  # 44 is task 2's
    bench.until(lambda: len(bench.queue()) == 1, "the two others have ended")
    bench.signal(f"{job}_2")
    bench.until(lambda: len(bench.rows("count", "2-of-3")) == 2, "a second generation of task 2")
    (bench.folder / "gate").touch()
    receipt = bench.whole("count", units=60, generations=4)
    restarts = {row["shard"]: row["restarts"] for row in receipt["generations"]}
    assert restarts == {"0-of-3": 0, "1-of-3": 0, "2-of-3": 1}


def test_preemption_with_a_grace_time_saves_and_is_requeued_once(bench: Bench) -> None:
    for partition in ("scavenge", "fleeting"):  # requeued, or ended for good, by the controller
        other = Bench(bench.folder / partition, bench.env["SLURM_CONF"])
        other.folder.mkdir()
        count(other, wait_for=gate(other, 20))
        node = {"scavenge": "n7", "fleeting": "n8"}[partition]
        job = other.submit("count", f"--partition={partition}", f"--nodelist={node}", "--exclusive")
        other.running("count", 20)
        urgent = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--time=1", f"--job-name={other.name}", "--output=/dev/null"]
        other.call("sbatch", *urgent, "--wrap", "sleep 1")
        other.until(lambda other=other: len(other.rows("count")) == 2, "a second generation")
        (other.folder / "gate").touch()
        receipt = other.whole("count", units=40, generations=2)
        assert other.causes(receipt) == ["preempted", "finished"]
        assert "Restarts=1 " in other.facts(job)


def test_a_stop_by_sigterm_that_the_controller_knows_nothing_of_is_not_resubmitted(bench: Bench) -> None:
    count(bench, wait_for=gate(bench, 20))
    job = bench.submit("count")
    bench.running("count", 20)
    bench.signal(job, "TERM")
    bench.gone()
    assert "Restarts=0 " in bench.facts(job)
    (row,) = bench.rows("count")
    assert (row["cause"], row["next"]) == ("terminated", "nothing")
