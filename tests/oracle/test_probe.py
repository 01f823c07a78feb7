"""The probe beside the oracle finds what is linearly there, from vectors side by side or pooled where their number differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

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


def ask(made, odds, **options):
    """Share right of the last 200, the 200 before them for validation."""
    items = made.examples[-200:]
    answers = answer_by_probe(made.examples[:-400], made.examples[-400:-200], items, made, odds=odds, **options)
    return np.mean([answer.text == item.target for answer, item in zip(answers, items)]), answers


class Differing:
    """One vector an example, in which the sign of "yes" (or of "a") turns with the layer, or with the question."""

    def __init__(self, *, classes: list[str], turns: str, counts: list[int]) -> None:
        rng = np.random.default_rng(1)
        self.examples, self._vectors = [], {}
        names = rng.permutation([name for name, count in enumerate(counts) for _ in range(count)])
        for number, name in enumerate(map(int, names)):
            target = classes[int(rng.integers(len(classes)))]
            asked = {"layers": [name]} if turns == "layer" else {"question": f"Is it {name}?"}
            item = example(key=f"k{number}", target=target, choices=classes, **asked)
            vector = rng.normal(size=8) * 0.3
            vector[(classes.index(target) + name) % len(classes)] += 3
            self.examples.append(item)
            self._vectors[item.key] = torch.tensor(vector, dtype=torch.float32)[None]

    def of(self, item):
        return self._vectors[item.key]


@pytest.mark.parametrize("classes", [["no", "yes"], ["a", "b", "c"]])
def test_what_one_direction_in_each_layer_holds_is_read_though_it_is_another_one_in_each(classes):
    made = Differing(classes=classes, turns="layer", counts=[400, 400])
    assert ask(made, ("no", "yes") if len(classes) == 2 else None)[0] > 0.95


def test_each_question_gets_a_probe_of_its_own_where_that_is_better_and_its_examples_suffice():
    made = Differing(classes=["no", "yes"], turns="question", counts=[400, 400])
    assert ask(made, ("no", "yes"))[0] < 0.7, "one direction serves one question at most"
    assert ask(made, ("no", "yes"), by_question=True)[0] > 0.95
    same = MadeVectors(["no", "yes"], ragged=False)
    for number, item in enumerate(same.examples):
        same.examples[number] = item.model_copy(update={"question": f"put in {number % 2} ways"})
    parts = same.examples[:160], same.examples[160:200], same.examples[200:]
    pooled = answer_by_probe(*parts, same, odds=("no", "yes"))
    assert answer_by_probe(*parts, same, odds=("no", "yes"), by_question=True) == pooled, "a tie goes to one probe for all phrasings"


def test_a_rare_layer_or_question_is_answered_by_the_probe_on_all_examples():
    for turns in ("layer", "question"):
        made = Differing(classes=["no", "yes"], turns=turns, counts=[800, 0, 12])  # the third turns as the first
        share, answers = ask(made, ("no", "yes"), by_question=True)
        assert share > 0.95 and len(answers) == 200


class Unbalanced:
    """85 % "yes", one vector an example; each of three layers holds a weak signal along a direction of its own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.examples, self._vectors = [], {}
        directions = rng.normal(size=(3, 32))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        for number in range(2400):
            layer, yes = number % 3, rng.random() < 0.85
            item = example(key=f"k{number}", target="yes" if yes else "no", choices=["no", "yes"], layers=[layer])
            vector = rng.normal(size=32) + directions[layer] * (0.6, 0.5, 0.4)[layer] * (1 if yes else -1)
            self.examples.append(item)
            self._vectors[item.key] = torch.tensor(vector, dtype=torch.float32)[None]

    def of(self, item):
        return self._vectors[item.key]


def test_log_odds_at_several_layers_are_of_one_scale_though_the_answer_is_nearly_always_yes():
    made = Unbalanced()
    items = made.examples[1200:]
    answers = answer_by_probe(made.examples[:900], made.examples[900:1200], items, made, odds=("no", "yes"))
    truth, odds = np.array([item.target == "yes" for item in items]), np.array([answer.odds for answer in answers])
    by_layer = [roc_auc_score(truth[layer::3], odds[layer::3]) for layer in range(3)]
    assert roc_auc_score(truth, odds) > np.mean(by_layer) - 0.03, "pooled, an item is compared with those of other layers too"
    assert min(odds[layer::3].std() for layer in range(3)) > 0.1, "no layer's probe is constant"
