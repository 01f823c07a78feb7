from __future__ import annotations

from itertools import product

import pytest

from tribunal.core.records import Problem
from tribunal.traces.sampling import Selection, plan, waves


def problems(n: int) -> list[Problem]:
    return [Problem(id=f"p{i}", question="?", answer="1", dataset="d", revision="r") for i in range(n)]


def select(verdicts: list[str], correct: int | None, incorrect: int | None) -> Selection:
    attempts = plan(problems(len(verdicts)), 1, seed=0)
    selection = Selection(attempts, correct=correct, incorrect=incorrect)
    selection.advance(dict(zip((attempt.key for attempt in attempts), verdicts)).get)
    return selection


def test_the_plan_shuffles_problems_and_keeps_their_samples_together():
    attempts = plan(problems(20), 3, seed=1)
    order = [attempt.problem.id for attempt in attempts[::3]]
    assert [attempt.key for attempt in attempts] == [f"{name}/{sample}" for name in order for sample in range(3)]
    assert sorted(order) == sorted(p.id for p in problems(20)) and order != [p.id for p in problems(20)]
    assert plan(problems(20)[::-1], 3, seed=1) == attempts  # of the seed and the problems alone
    assert plan(problems(20), 3, seed=1, most=7) == attempts[:7]
    assert [len(wave) for wave in waves(attempts, 25)] == [25, 25, 10]


@pytest.mark.parametrize("verdicts", product(["correct", "incorrect", "truncated"], repeat=5))
def test_the_shortest_prefix_that_meets_the_targets_is_kept(verdicts):
    selection = select(list(verdicts), 2, 1)
    enough = [n for n in range(6) if verdicts[:n].count("correct") >= 2 and verdicts[:n].count("incorrect") >= 1]
    assert selection.met == bool(enough) and selection.done == (enough[0] if enough else 5)
    kept = [verdicts[selection.attempts.index(attempt)] for attempt in selection.kept]
    for verdict, most in (("correct", 2), ("incorrect", 1), ("truncated", 5)):
        assert kept.count(verdict) == min(most, verdicts[: selection.done].count(verdict))
    assert [w.split(" ")[0] for w in selection.warnings()] == [
        f"target_{v}" for v, target in (("correct", 2), ("incorrect", 1)) if verdicts.count(v) < target
    ]


def test_a_gap_in_the_order_stops_the_count():
    attempts = plan(problems(4), 1, seed=0)
    selection = Selection(attempts, correct=2, incorrect=None)
    known = {attempts[0].key: "correct", attempts[2].key: "correct"}
    selection.advance(known.get)
    assert (selection.done, selection.met) == (1, False)
    selection.advance({**known, attempts[1].key: "incorrect"}.get)
    assert (selection.done, selection.met) == (3, True)


def test_without_targets_everything_is_kept():
    selection = select(["correct", "unparsable", "incorrect"], None, None)
    assert len(selection.kept) == selection.done == 3 and not selection.met and not list(selection.warnings())
