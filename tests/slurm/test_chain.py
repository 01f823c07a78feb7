"""Dependent jobs start on their inputs' receipts: interruptions neither release them early nor leave them waiting for ever."""

from __future__ import annotations

import pytest

from tests.slurm.bench import Bench

STAGES = ("first", "second", "third")


@pytest.mark.parametrize("requeue", ["--requeue", "--no-requeue"])
def test_a_chain_of_three_interrupted_in_each_stage_ends_whole(bench: Bench, requeue: str) -> None:
    ids: list[str] = []
    for stage in STAGES:
        bench.sections[stage] = {"units": 20, "seconds": 0.02, "wait_for": {"10": bench.folder / f"gate-{stage}"}}
    for stage in STAGES:
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(bench.submit(stage, requeue, *after))
    for stage, job in zip(STAGES, ids, strict=True):
        bench.running(stage, 10)
        bench.signal(job)
        bench.until(lambda stage=stage: len(bench.rows(stage)) == 2, f"a second generation of {stage}")
        (bench.folder / f"gate-{stage}").touch()
        bench.finished(stage)
    bench.gone()
    for stage in STAGES:
        receipt = bench.finished(stage)
        assert receipt["totals"]["units"] == 20 and len(receipt["generations"]) == 2
    for stage in STAGES:  # the reference runs them one after the other
        expected = bench.undisturbed(stage)
    assert bench.finished("third")["digest"] == expected["digest"]
    assert [path.name for path in (bench.folder / "checkpoints" / "x").iterdir()] == ["submissions"]


def test_a_child_without_its_input_puts_itself_back_and_starts_on_the_receipt(bench: Bench) -> None:
    for stage in STAGES[:2]:
        bench.sections[stage] = {"units": 4, "seconds": 0.02}
    child = bench.submit("second")
    bench.until(lambda: "BeginTime" in " ".join(bench.queue()), "the child is back in the queue")
    assert "second: the results of first are not there yet" in bench.logs()
    bench.submit("first")
    bench.finished("first")
    receipt = bench.finished("second")
    assert len(receipt["generations"]) == 1, "waiting is no generation"
    assert receipt["generations"][0]["job"] == child


def test_a_child_whose_parent_was_given_up_ends_and_says_why(bench: Bench) -> None:
    bench.sections["first"] = {"units": 4, "fail_in_build": True}
    bench.submit("first")
    bench.until(lambda: len(bench.rows("first")) == 2 and bench.rows("first")[1]["next"] == "nothing", "the parent is given up")
    child = bench.submit("second")
    bench.gone()
    assert "error: second reads the results of first, which has ended without any (failed: the same exception" in bench.logs()
    assert "ExitCode=2:0" in bench.facts(child)


def test_all_stages_in_one_allocation_over_several_generations(bench: Bench) -> None:
    for stage in STAGES:
        bench.sections[stage] = {"units": 20, "seconds": 0.02, "wait_for": {"10": bench.folder / f"gate-{stage}"}}
    script = bench.script("first")
    script.write_text(script.read_text().replace("jobs.first", "tribunal.cluster first,second,third"))
    job = bench.call("sbatch", "--parsable", script, bench.experiment()).strip()
    for restarts, stage in enumerate(STAGES, 1):
        bench.running(stage, 10)
        bench.signal(job)
        bench.until(lambda stage=stage: len(bench.rows(stage)) == 2, f"a second generation of {stage}")
        assert f"Restarts={restarts} " in bench.facts(job)
        (bench.folder / f"gate-{stage}").touch()
        bench.finished(stage)
    bench.gone()
    for stage in STAGES:
        expected = bench.undisturbed(stage)
    assert bench.finished("third")["digest"] == expected["digest"]
    assert [row["units"] for row in bench.finished("second")["generations"]] == [10, 10]
    assert "ExitCode=0:0" in bench.facts(job)
