"""From answers to words: metrics against scikit-learn, and what is said of an oracle that reads and of one that does not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from tests.oracle.helpers import example
from tribunal.core.reports import faults
from tribunal.core.stats import Resamples
from tribunal.oracle.probe import ProbeAnswer
from tribunal.oracle.verdict import PROMPT_ONLY, TaskAnswers, TaskScores, macro_f1, make_report, mean

RNG = np.random.default_rng(0)
ITEMS = [
    example(key=f"carry/p{n // 4}/0/{n}", problem_id=f"p{n // 4}", target=str(RNG.integers(2)), choices=["0", "1"], split="test")
    for n in range(160)
]
RIGHT = [ProbeAnswer(item.target, 3.0 if item.target == "1" else -3.0) for item in ITEMS]
COIN = [ProbeAnswer(str(RNG.integers(2)), float(RNG.normal())) for _ in ITEMS]
ONES = [ProbeAnswer("1", None)] * len(ITEMS)


def scores(oracle, **said) -> TaskScores:
    everything = {"oracle": oracle, "majority": ONES, "text_only": COIN, "shuffled": COIN, "zeroed": ONES, "linear_probe": RIGHT, **said}
    resamples = Resamples(sorted({item.problem_id for item in ITEMS}), 200, 0)
    return TaskScores(TaskAnswers("carry", ITEMS, everything, {50: COIN}, {}, ("0", "1")), resamples)


def test_a_problem_and_its_hinted_twins_are_resampled_together():
    twins = [item.model_copy(update={"group": f"g{n // 8:02}"}) for n, item in enumerate(ITEMS)]  # two problem ids in each group
    resamples = Resamples(sorted({item.group for item in twins}), 200, 0)
    task = TaskScores(TaskAnswers("carry", twins, {"oracle": COIN, "majority": ONES}, {}, {}, ("0", "1")), resamples)
    right = np.array([answer.text == item.target for answer, item in zip(COIN, twins)], dtype=float)
    by_group = np.array([right[start : start + 8].mean() for start in range(0, len(twins), 8)])
    expected = [np.average(by_group, weights=counts) for counts in resamples.counts_RG]
    assert task.estimate("exact_match", COIN).draws == pytest.approx(expected) and task.details()["problems"] == 20


def report(*tasks: TaskScores, planted: bool = False):
    given = {
        "job": "evaluate_oracle",
        "experiment": "made",
        "text_only": True,
        "layers": [1],
        "figure": "f.png",
        "details": {},
        "best": 100,
    }
    return make_report(tasks, planted=planted, **given)


def test_macro_f1_is_scikit_learns_under_any_weights():
    labels, said = RNG.integers(0, 3, 50), RNG.integers(-1, 3, 50).astype(float)
    weights = RNG.integers(0, 3, (4, 50)).astype(float)
    for row, value in zip(weights, macro_f1(said, labels, weights)):
        there = sorted(set(labels[row > 0]))
        expected = f1_score(labels, said, labels=there, average="macro", sample_weight=row, zero_division=0)
        assert value == pytest.approx(expected)
    assert mean(said, labels, weights) == pytest.approx([np.average(said, weights=row) for row in weights])


def test_macro_f1_of_yes_and_no_reads_answers_as_the_fuzzy_match_does():
    items = [example("correctness", key=f"k{n}", target=("yes", "no")[n % 2], choices=["yes", "no"], split="test") for n in range(40)]
    said = [ProbeAnswer({"yes": "Yes, it is not wrong.", "no": "No, it is not."}[item.target], None) for item in items]
    task = TaskScores(
        TaskAnswers("correctness", items, {"oracle": said, "majority": said}, {}, {}, ("no", "yes")), Resamples(["p"], 100, 0)
    )
    assert task.estimate("macro_f1", said).value == task.estimate("fuzzy_match", said).value == 1


def test_an_oracle_that_is_right_where_its_controls_guess_reads_the_activations():
    task = scores(RIGHT)
    assert task.unbeaten == [] and task.apart and task.constant is None
    made = report(task)
    assert made.verdict.startswith("Read from the activations: carry 1.000 [1.000, 1.000] (best control: ")
    assert not faults(made)
    assert any(line.startswith("That asking beats a linear probe") and "carry" in line for line in made.not_supported)


def test_an_oracle_that_a_control_equals_reads_the_prompt_and_that_is_said():
    task = scores(RIGHT, text_only=RIGHT)
    assert task.unbeaten == ["text_only"] and not task.apart
    assert f"carry: {PROMPT_ONLY} (1.000 [1.000, 1.000], not above text_only)" in report(task).verdict
    assert "No task is read from the activations" in report(task).verdict
    assert "planted" in report(task, planted=True).verdict and "planted" not in report(task).verdict


def test_an_oracle_that_always_says_the_same_is_named():
    task = scores([ProbeAnswer("1", 1.0)] * len(ITEMS))
    assert task.constant == "1" and "answers '1' to nearly everything" in report(task).verdict


def test_rows_of_another_checkpoint_stand_beside_the_controls_that_do_not_depend_on_it():
    rows = {row.name: row for row in report(scores(RIGHT)).rows}
    assert {control.name for control in rows["carry, exact match, step 50"].controls} == {"majority", "text_only", "linear_probe"}
    assert {"carry, exact match", "carry, fuzzy match", "carry, macro-F1", "carry, AUROC", "carry, ECE"} <= set(rows)
    steps = report(scores(RIGHT)).details["steps"]
    assert [(row["step"], row["best"]) for row in steps] == [(50, False), (100, True)]


def test_controls_without_log_odds_have_no_auroc_and_the_row_says_nothing_of_them():
    row = next(row for row in report(scores(RIGHT)).rows if row.name == "carry, AUROC")
    assert {control.name for control in row.controls} == {"text_only", "shuffled", "linear_probe"} and row.value == 1
