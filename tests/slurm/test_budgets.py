"""Each cause has its budget: crash loops and loops without progress end, a poison unit is set aside, limits are met."""

from __future__ import annotations

import time

from tests.slurm.bench import Bench


def test_the_same_exception_twice_is_a_failure_and_nothing_is_queued_again(bench: Bench) -> None:
    bench.sections["count"] = {"units": 4, "fail_in_build": True}
    job = bench.submit("count")
    bench.until(lambda: [row["next"] for row in bench.rows("count")] == ["requeue", "nothing"], "given up after two generations")
    bench.gone()
    first, second = bench.rows("count")
    assert first["cause"] == second["cause"] == "failed"
    assert "failed: the same exception in generations 1 and 2: RuntimeError: no such layer" in second["why"]
    assert "error: count is not resubmitted: failed: the same exception" in bench.logs()
    assert "ExitCode=1:0" in bench.facts(job) and "Restarts=1 " in bench.facts(job)


def test_a_unit_that_raised_twice_is_set_aside_and_the_digest_says_so(bench: Bench) -> None:
    bench.sections["count"] = {"units": 10, "seconds": 0.01, "fail_in": "6"}
    bench.submit("count")
    receipt = bench.finished("count")
    bench.gone()
    assert receipt["set_aside"] == ["6"]
    assert receipt["totals"]["units"] == 9
    assert bench.causes(receipt) == ["failed", "failed", "finished"]
    whole = bench.undisturbed("count")
    assert whole["set_aside"] == [] and whole["digest"] != receipt["digest"]


def test_a_unit_that_killed_the_process_twice_is_set_aside(bench: Bench) -> None:
    bench.sections["count"] = {"units": 10, "seconds": 0.01, "die_in": "0"}
    bench.submit("count")
    receipt = bench.finished("count")
    bench.gone()
    assert receipt["set_aside"] == ["0"]
    assert receipt["totals"]["units"] == 9
    assert bench.causes(receipt) == ["crashed", "crashed", "finished"]
    assert receipt["generations"][0]["error"] == "killed by SIGKILL"


def test_being_asked_to_stop_before_the_first_unit_costs_nothing(bench: Bench) -> None:
    bench.slurm["save_every_s"] = 600
    bench.sections["count"] = {"units": 4, "seconds": 0.01, "wait_for": {"0": bench.folder / "gate"}}
    job = bench.submit("count", "--no-requeue")
    for generation in (1, 2, 3):
        bench.until(lambda n=generation: [row["done"] for row in bench.rows("count")] == [0] * n, f"generation {generation} works")
        bench.signal(job)
        bench.until(lambda n=generation: len(bench.rows("count")) == n + 1, "the next one")
        job = bench.rows("count")[-1]["job"]
    (bench.folder / "gate").touch()
    receipt = bench.whole("count", units=4, generations=4)
    assert bench.causes(receipt) == ["asked"] * 3 + ["finished"]


def test_generations_without_a_unit_end_naming_the_unit(bench: Bench) -> None:
    bench.slurm["save_every_s"] = 1
    bench.sections["count"] = {"units": 4, "seconds": 0.01, "wait_for": {"2": bench.folder / "never"}}
    job = bench.submit("count")
    for generation in (1, 2, 3):  # the first makes two units durable
        bench.until(lambda n=generation: len(bench.rows("count")) == n and bench.units("count") == 2, f"generation {generation} waits")
        bench.until(lambda: "RUNNING" in bench.queue()[0], "it runs")
        bench.until(lambda: (began := bench.rows("count")[-1]["working"]) and time.time() > began + 1, "it has worked for save_every_s")
        bench.signal(job)
        bench.until(lambda n=generation: bench.rows("count")[n - 1]["next"], "a decision")
    bench.gone()
    assert bench.rows("count")[-1]["next"] == "nothing"
    assert "no progress: 2 generations in a row made no number durable" in bench.rows("count")[-1]["why"]


def test_max_generations_is_a_limit(bench: Bench) -> None:
    bench.sections["count"] = {"units": 40, "seconds": 0.2}
    bench.slurm["max_generations"] = 1
    job = bench.submit("count")
    bench.running("count", 3)
    bench.signal(job)
    bench.gone()
    (row,) = bench.rows("count")
    assert row["next"] == "nothing" and "exhausted: 1 generations of at most 1" in row["why"]


def test_bad_input_is_not_resubmitted(bench: Bench) -> None:
    bench.sections["count"] = {"unitz": 40}
    job = bench.submit("count")
    bench.gone()
    assert "count: unknown key 'unitz'; did you mean 'units'?" in bench.logs()
    assert "ExitCode=2:0" in bench.facts(job) and "Restarts=0 " in bench.facts(job)
