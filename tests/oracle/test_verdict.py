"""From answers to words: metrics against scikit-learn, and what is said of an oracle that reads and of one that does not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from tests.oracle.helpers import example
from tribunal.core.reports import faults
from tribunal.core.stats import Resamples
from tribunal.oracle.evaluation import BEST, Who
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


def scores(oracle, *, who: Who = BEST, **said) -> TaskScores:
    everything = {"oracle": oracle, "majority": ONES, "text_only": COIN, "shuffled": COIN, "zeroed": ONES, "linear_probe": RIGHT, **said}
    resamples = Resamples(sorted({item.group for item in ITEMS}), 200, 0)
    return TaskScores(TaskAnswers("carry", ITEMS, everything, ("0", "1"), who), resamples)


def test_a_problem_and_its_hinted_twins_are_resampled_together():
    twins = [item.model_copy(update={"group": f"g{n // 8:02}"}) for n, item in enumerate(ITEMS)]  # two problem ids in each group
    resamples = Resamples(sorted({item.group for item in twins}), 200, 0)
    task = TaskScores(TaskAnswers("carry", twins, {"oracle": COIN, "majority": ONES}, ("0", "1")), resamples)
    right = np.array([answer.text == item.target for answer, item in zip(COIN, twins)], dtype=float)
    by_group = np.array([right[start : start + 8].mean() for start in range(0, len(twins), 8)])
    expected = [np.average(by_group, weights=counts) for counts in resamples.counts_RG]
    assert task.estimate("exact_match", "oracle").draws == pytest.approx(expected) and task.details()["problems"] == 20


def report(*tasks: TaskScores, planted: bool = False):
    given = {
        "job": "evaluate_oracle",
        "experiment": "made",
        "control": [],
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
    task = TaskScores(TaskAnswers("correctness", items, {"oracle": said}, ("no", "yes")), Resamples(["p"], 100, 0))
    assert task.estimate("macro_f1", "oracle").value == task.estimate("fuzzy_match", "oracle").value == 1


def test_an_oracle_that_is_right_where_its_controls_guess_reads_the_activations():
    task = scores(RIGHT)
    assert task.read_by == "exact_match" and task.apart and not task.constancy.constant
    made = report(task)
    assert made.verdict.startswith("Read from the activations: carry 1.000 [1.000, 1.000] (best control: ")
    assert not faults(made)
    assert any(line.startswith("That asking beats a linear probe") and "carry (exact match)" in line for line in made.not_supported)


def test_an_oracle_that_a_control_equals_reads_the_prompt_and_that_is_said():
    task = scores(RIGHT, text_only=RIGHT)
    assert task.read_by is None and task.unbeaten("exact_match") == ["text_only"] and not task.apart
    assert f"carry: {PROMPT_ONLY} (1.000 [1.000, 1.000], not above text_only)" in report(task).verdict
    assert "No task is read from the activations" in report(task).verdict
    assert "planted" in report(task, planted=True).verdict and "planted" not in report(task).verdict


def test_an_oracle_that_always_says_the_same_is_named():
    task = scores([ProbeAnswer("1", 1.0)] * len(ITEMS))
    assert task.constancy.constant and "answers '1' to nearly everything" in report(task).verdict


@pytest.mark.parametrize(("problems", "said"), [(9, False), (10, True)])
def test_nothing_is_said_to_be_read_or_not_where_the_items_are_of_fewer_than_ten_problems(problems, said):
    """An oracle that guesses once for each of three problems beats every control by such an interval one time in four."""
    items = [item.model_copy(update={"group": f"g{n % problems}"}) for n, item in enumerate(ITEMS)]
    everything = {"oracle": RIGHT, "majority": ONES, "text_only": COIN, "shuffled": COIN, "zeroed": ONES, "linear_probe": RIGHT}
    resamples = Resamples(sorted({item.group for item in items}), 200, 0)
    task = TaskScores(TaskAnswers("carry", items, everything, ("0", "1")), resamples)
    assert task.details()["reads_activations"] is said and not task.unbeaten("exact_match")
    made = report(task)
    words = "carry: 9 held-out problems are too few to say what it reads (1.000 [1.000, 1.000], best control: "
    assert made.verdict.startswith("Read from the activations: carry 1.000" if said else words), made.verdict
    assert (words in made.verdict) is not said and PROMPT_ONLY not in made.verdict and not faults(made)
    assert ("Whether the oracle reads carry: that takes items of 10 held-out problems." in made.not_supported) is not said
    assert PROMPT_ONLY not in TaskScores(TaskAnswers("carry", items, {**everything, "oracle": COIN}, None), resamples).sentence() or said


def test_a_coin_that_is_read_is_called_a_leak():
    leaky = scores(RIGHT)
    leaky.task = "random_bit"
    assert "Nothing can tell random_bit: look for a leak" in report(leaky, scores(RIGHT)).verdict
    assert "leak" not in report(scores(RIGHT)).verdict


def test_log_odds_that_separate_behind_words_that_do_not_are_never_called_reading_the_prompt():
    biased = [ProbeAnswer("1", (5.0 if item.target == "1" else 3.0) + float(RNG.normal()) * 0.6) for item in ITEMS]
    task = scores(biased)
    truth = [item.target == "1" for item in ITEMS]
    said = report(task).verdict
    value = roc_auc_score(truth, [answer.odds for answer in biased])
    assert 0.97 < value < 1 and task.read_by == "auroc" and task.details()["reads_activations"]
    assert f"carry: its words do not use what its log-odds separate (AUROC {value:.3f} [0." in said and "; exact match 0." in said
    assert "not above majority" in said and "'1' to nearly everything" in said and PROMPT_ONLY not in said
    assert said.startswith("No task is read from the activations in words. ")
    for rival in ("text_only", "shuffled", "zeroed"):
        assert PROMPT_ONLY in report(scores(biased, **{rival: biased})).verdict, "log-odds that a control has too show nothing"


def test_log_odds_that_separate_the_wrong_way_round_are_told_and_not_called_reading_the_prompt():
    noise = np.random.default_rng(7).normal(size=len(ITEMS))
    backwards = [ProbeAnswer("1", (-3.0 if item.target == "1" else 3.0) + float(z)) for item, z in zip(ITEMS, noise)]
    task = scores(backwards)
    assert task.read_by is None and task.inverted and task.details()["inverted"]
    value = roc_auc_score([item.target == "1" for item in ITEMS], [answer.odds for answer in backwards])
    said = report(task).verdict
    assert f"carry: its log-odds separate the answers, the wrong way round (AUROC {value:.3f} [0." in said and PROMPT_ONLY not in said
    assert said.startswith("No task is read from the activations. ")
    for rival in ("text_only", "shuffled", "zeroed"):
        assert PROMPT_ONLY in report(scores(backwards, **{rival: backwards})).verdict, "log-odds that a control has too show nothing"


def test_the_linear_probe_is_compared_by_the_metric_that_the_task_is_read_by_and_the_words_name_it():
    biased = [ProbeAnswer("1", (5.0 if item.target == "1" else 3.0) + float(RNG.normal()) * 0.6) for item in ITEMS]
    blunt = [ProbeAnswer(item.target, (1.0 if item.target == "1" else -1.0) + 3 * float(RNG.normal())) for item in ITEMS]
    behind, ahead = scores(biased), scores(biased, linear_probe=blunt)
    assert behind.read_by == ahead.read_by == "auroc"
    assert behind.over_linear_probe.value == pytest.approx(behind.estimate("auroc", "oracle").value - 1)
    assert "A linear probe on the same activations reads carry (AUROC) better than the oracle does" in report(behind).verdict
    assert "That asking beats a linear probe on the same activations: it does not on carry (AUROC)." in report(behind).not_supported
    assert ahead.over_linear_probe.interval[0] > 0, "though the probe's words are right and the oracle's are not"
    assert "linear probe" not in report(ahead).verdict + " ".join(report(ahead).not_supported)
    unread = scores(COIN)
    assert unread.read_by is None and unread.over_linear_probe.value == unread.estimate("exact_match", "oracle").value - 1


def test_right_answers_in_other_words_than_the_targets_are_read_from_the_activations():
    task = scores([ProbeAnswer(f"It is {item.target}.", None) for item in ITEMS])
    assert task.read_by == "fuzzy_match"
    assert "carry: right in other words than the target's (fuzzy match 1.000 [1.000, 1.000], " in report(task).verdict
    assert "exact match 0.000 [0.000, 0.000], not above majority" in report(task).verdict


def test_a_published_adapter_is_judged_by_the_rules_of_the_best_checkpoint_in_a_sentence_of_its_own():
    theirs, parrot, deaf = (Who(adapter=name) for name in ("their/adapter", "a/parrot", "deaf"))
    made = report(
        scores(RIGHT),
        scores(RIGHT, who=theirs),
        scores([ProbeAnswer("1", 0.0)] * len(ITEMS), who=parrot),
        scores(RIGHT, who=deaf, shuffled=RIGHT),
        scores(COIN, who=Who(step=50)),
    )
    parts = made.verdict.split(". ")
    assert [part.partition(": ")[0] for part in parts if part.startswith("Adapter")] == [
        "Adapter their/adapter",
        "Adapter a/parrot",
        "Adapter deaf",
    ]
    sentences = dict(part.removeprefix("Adapter ").split(": ", 1) for part in parts if part.startswith("Adapter"))
    assert sentences["their/adapter"].startswith("read from the activations: carry 1.000 [1.000, 1.000] (best control: ")
    assert PROMPT_ONLY in sentences["a/parrot"] and "answers '1' to nearly everything" in sentences["a/parrot"]
    assert f"carry: {PROMPT_ONLY} (1.000 [1.000, 1.000], not above shuffled)" in sentences["deaf"]
    assert {name: row["carry"]["reads_activations"] for name, row in made.details["adapters"].items()} == {
        "their/adapter": True,
        "a/parrot": False,
        "deaf": False,
    }


def test_every_adapters_rows_have_all_controls_and_only_the_best_checkpoint_has_a_row_for_each_metric():
    made = report(scores(COIN, who=Who(step=50)), scores(RIGHT), scores(RIGHT, who=Who(adapter="x")))
    assert [row.name for row in made.rows] == [
        *(f"carry, {metric}" for metric in ("exact match", "fuzzy match", "macro-F1", "AUROC", "ECE")),
        *(f"carry, {metric}, adapter x" for metric in ("exact match", "fuzzy match", "AUROC")),
        "carry, exact match, step 50",
    ]
    every = {"majority", "text_only", "shuffled", "zeroed", "linear_probe"}
    assert all({control.name for control in row.controls} == every for row in made.rows if row.metric == "exact_match")
    assert [(row["step"], row["best"]) for row in made.details["steps"]] == [(50, False), (100, True)]


def test_controls_without_log_odds_have_no_auroc_and_the_row_says_nothing_of_them():
    row = next(row for row in report(scores(RIGHT)).rows if row.name == "carry, AUROC")
    assert {control.name for control in row.controls} == {"text_only", "shuffled", "linear_probe"} and row.value == 1
