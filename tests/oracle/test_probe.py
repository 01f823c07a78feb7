"""The probe beside the oracle finds what is linearly there, from vectors side by side or pooled where their number differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracle.helpers import example
from tribunal.oracle.probe import answer_by_probe


class MadeVectors:
    """The target's class adds to one direction of every vector."""

    def __init__(self, classes: list[str], ragged: bool) -> None:
        rng = np.random.default_rng(0)
        self.examples, self._vectors = [], {}
        for number in range(240):
            target = classes[int(rng.integers(len(classes)))]
            count = int(rng.integers(1, 4)) if ragged else 3
            item = example(key=f"k{number}", target=target, choices=classes, tokens=list(range(count)), layers=[0, 1])
            vectors = rng.normal(size=(2 * count, 8))
            vectors[:, classes.index(target)] += 3
            self.examples.append(item)
            self._vectors[item.key] = torch.tensor(vectors, dtype=torch.float32)

    def of(self, item):
        return self._vectors[item.key]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("classes", [["no", "yes"], ["a", "b", "c", "d"]])
def test_it_reads_what_is_there_and_gives_log_odds_for_two_answers(classes, ragged):
    made = MadeVectors(classes, ragged)
    odds = (classes[0], classes[1]) if len(classes) == 2 else None
    items = made.examples[200:]
    answers = answer_by_probe(made.examples[:160], made.examples[160:200], items, made, odds=odds)
    assert np.mean([answer.text == item.target for answer, item in zip(answers, items)]) > 0.9
    assert all((answer.odds is None) == (odds is None) for answer in answers)
    if odds:
        assert all((answer.odds >= 0) == (answer.text == "yes") for answer in answers)
