from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from tribunal.datasets.addition import Dataset


def make(**keys):
    return Dataset(name="addition", **keys).problems()


def test_problems_are_sums_of_two_numbers_of_the_stated_digits_and_unique():
    problems = make(digits=[1, 2, 4], per_digits=20)
    assert Counter(problem.stratum for problem in problems) == {"1 digit": 20, "2 digits": 20, "4 digits": 20}
    pairs = set()
    for problem in problems:
        a, plus, b, equals = problem.question.split()
        assert (plus, equals) == ("+", "=") and problem.answer == str(int(a) + int(b)) and problem.id == f"{a}+{b}"
        assert len(a) == len(b) == int(problem.stratum[0])
        pairs.add(frozenset((a, b)))
    assert len(pairs) == 60


def test_the_same_seed_gives_the_same_problems_whatever_else_is_asked_for():
    few, many = make(per_digits=5), make(per_digits=50)
    assert set(problem.id for problem in few) <= set(problem.id for problem in many)
    assert make(per_digits=5) == few != make(per_digits=5, seed=1)
    assert [problem.id for problem in few][:2] == ["91+18", "251+706"]  # pinned: ids name results on disk


def test_any_first_n_problems_are_balanced_over_the_digit_counts():
    assert Counter(problem.stratum for problem in make(limit=6)) == {"2 digits": 2, "3 digits": 2, "4 digits": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"digits": [1], "per_digits": 40}, "too many for 1-digit"),
        ({"digits": [0]}, "from 1 to 9"),
        ({"digits": [2, 2]}, "once"),
        ({"path": "x.jsonl"}, "made, not read"),
        ({"revision": "abc"}, "made, not read"),
        ({"digitz": [2]}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        make(**keys)
