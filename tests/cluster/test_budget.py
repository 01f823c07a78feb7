"""The decision to go on, from the generations of a shard alone."""

from __future__ import annotations

from typing import Any

import pytest

from tribunal.cluster.budget import MAX_SET_ASIDE, decide, units_set_aside
from tribunal.core.config import SlurmConfig

SLURM = SlurmConfig(max_generations=5, no_progress_generations=2)


def row(cause: str, units: int = 5, **facts: Any) -> dict[str, Any]:
    """A generation that was launched at 0, started at 1 s, had loaded at 100 s and ended at 1000 s."""
    blank = {"error": None, "mendable": None, "in_flight": [], "progressed": None, "done": 0, "unit": "trace"}
    times = {"launched": 0.0, "started": 1.0, "working": 100.0, "ended": 1000.0}
    return {**blank, **times, "cause": cause, "units": units, **facts}


@pytest.mark.parametrize("cause", ["time limit", "deadline", "preempted", "asked", "requeued", "crashed"])
def test_a_first_interruption_goes_on(cause: str) -> None:
    assert decide([row(cause)], SLURM).go_on


@pytest.mark.parametrize("cause", ["cancelled", "terminated", "interrupted", "superseded"])
def test_a_stop_for_good_stays_one(cause: str) -> None:
    assert decide([row(cause)], SLURM) == (False, cause)


def test_time_limits_and_preemptions_are_counted_up_to_max_generations() -> None:
    assert decide([row("time limit"), row("preempted")] * 2, SLURM).go_on
    assert decide([row("time limit")] * 5, SLURM) == (False, "exhausted: 5 generations of at most 5 (slurm.max_generations)")


def test_the_same_exception_twice_ends_it_though_numbers_in_it_differ() -> None:
    first, second = (row("failed", error=f"RuntimeError: bad row {n} at 0x{n}f (x.py:3)") for n in (1, 2))
    assert decide([first], SLURM).go_on
    assert not decide([first, row("time limit"), second], SLURM).go_on
    assert decide([first, row("failed", error="ValueError: another (x.py:9)")], SLURM).go_on


def test_an_error_that_the_user_can_mend_is_not_tried_again() -> None:
    assert decide([row("failed", error="StorageError: disk full", mendable=True)], SLURM) == (False, "failed: StorageError: disk full")


def test_an_item_that_ended_two_generations_is_set_aside_and_the_rest_goes_on() -> None:
    rows = [row("failed", 0, error="E: 1", in_flight=["a", "b"]), row("failed", 0, error="E: 1", in_flight=["a", "b"])]
    assert decide(rows, SLURM).go_on
    assert units_set_aside(rows) == {"a", "b"}
    assert units_set_aside(rows[:1]) == frozenset()
    assert units_set_aside([row("time limit", in_flight=["a"])] * 3) == frozenset(), "a stop is not the unit's fault"
    elsewhere = row("failed", error="E: 1", in_flight=["c"])
    assert decide([*rows, elsewhere], SLURM).go_on, "a new item has its first try"
    assert not decide([*rows, elsewhere, row("failed", error="E: 1", in_flight=["d"])], SLURM).go_on, "the same exception in two items"


def test_many_items_set_aside_are_a_bad_run() -> None:
    rows = [row("crashed", error="killed by SIGKILL", in_flight=[str(n)]) for n in range(MAX_SET_ASIDE + 1) for _ in range(2)]
    assert "units each ended 2 generations" in decide(rows, SlurmConfig(max_generations=100)).why


def test_generations_that_make_nothing_durable_end_it_naming_the_unit() -> None:
    rows = [row("time limit"), row("time limit", 0), row("deadline", 0, in_flight=["17/0"])]
    decision = decide(rows, SLURM)
    assert not decision.go_on and "2 generations in a row made no trace durable; the last worked on unit '17/0'" in decision.why


@pytest.mark.parametrize("cause", ["asked", "preempted", "requeued"])
def test_a_stop_from_outside_says_nothing_about_progress_before_the_work_had_to_save(cause: str) -> None:
    soon = [row(cause, 0, ended=100.0 + SLURM.save_every_s - 1)] * 4
    assert decide(soon, SLURM).go_on
    assert decide([row(cause, 0, done=None, working=None)] * 4, SLURM).go_on, "it was still loading"
    assert decide([row("asked", 0, done=None, working=None, ended=None)] * 4, SLURM).go_on, "it was killed while loading"
    later = [row(cause, 0, ended=100.0 + SLURM.save_every_s)] * 2
    assert "no progress: 2 generations in a row" in decide([*later, *soon], SlurmConfig(max_generations=9)).why
    assert decide([*later, *soon[:2], row(cause, 0, progressed=True)], SlurmConfig(max_generations=9)).go_on


def test_a_time_limit_counts_however_soon_it_comes_unless_earlier_stages_had_used_it_up() -> None:
    soon = {"started": 2.0, "working": None, "done": None, "ended": 3.0}
    assert not decide([row("time limit", 0, **soon)] * 2, SLURM).go_on, "the limit is too short for the lead"
    late = {"launched": 0.0, "started": 9000.0, "working": 9100.0, "ended": 10_000.0}
    assert decide([row("time limit", 0, **late), row("deadline", 0, in_flight=["17/0"])], SLURM).go_on
    assert not decide([row("time limit", 0, **late), *[row("time limit", 0)] * 2], SLURM).go_on
    assert not decide([row("crashed", 0, **late, error="killed by SIGKILL")] * 2, SLURM).go_on
