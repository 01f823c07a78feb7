"""The label audit refuses the failures that were published, and passes labels that mean something."""

from __future__ import annotations

import pytest

from tests.oracle.helpers import example
from tribunal.core.errors import LabelError
from tribunal.core.records import Problem
from tribunal.oracle.audit import AuditSettings, audit_examples

SETTINGS = AuditSettings()


def examples(task: str, targets, *, problems: int | None = None):
    """One for each target, ten problems to a split unless said."""
    found = []
    for n, target in enumerate(targets):
        problem = n if problems is None else n % problems
        split = ("train", "train", "validation", "test")[problem % 4]
        found.append(example(task, key=f"{task}/{n}", problem_id=f"p{problem}", target=target, split=split))
    return found


def refusals(task: str, targets, most: int = 64):
    found = audit_examples(examples(task, targets), SETTINGS, count_tokens=lambda text: len(text.split()), max_new_tokens=most)
    return found.refusals


def test_balanced_closed_labels_and_different_summaries_pass():
    audit = audit_examples(
        [*examples("carry", ["0", "1"] * 100), *examples("reasoning_summary", [f"It turns on step {n}." for n in range(200)])],
        SETTINGS,
        tasks=["carry", "reasoning_summary"],
    )
    assert audit.refusals == []
    audit.require()
    assert audit.rows["carry"]["top_share"] == 0.5 and audit.rows["carry"]["splits"] == {"train": 100, "validation": 50, "test": 50}


def test_two_hundred_identical_summaries_are_refused():
    [share, distinct] = refusals("reasoning_summary", ["The model solves the problem step by step."] * 200)
    assert share.startswith("reasoning_summary: 100.0% of 200 targets are 'The model solves")
    assert distinct.startswith("reasoning_summary: 1 distinct targets in 200 (0.5%, at least 20%)")


def test_labels_of_which_99_7_per_cent_are_one_class_are_refused():
    [line] = refusals("sentence_importance", ["high"] * 997 + ["low"] * 3)
    assert "99.7% of 1000 targets are 'high' (at most 90%): a constant answer scores that" in line
    assert "train_oracle.audit.max_class_share" in line
    assert refusals("sentence_importance", ["high"] * 89 + ["low"] * 11) == []


def test_targets_with_exact_probabilities_are_refused():
    [line] = refusals("context_prediction", [f"The probability is 0.{n:03d}" for n in range(200)])
    assert "200 of 200 targets hold an exact number" in line and "buckets" in line
    assert "exact number" in refusals("context_prediction", [f"The answer has {n} %" for n in range(200)])[0]
    assert refusals("context_prediction", [f"step {n} costs 3.5 dollars" for n in range(200)]) == []


def test_a_problem_that_is_trained_on_and_tested_is_refused_by_id_and_word_for_word():
    twice = [
        example(key=str(n), problem_id="p0", split=split, target=str(n % 2))
        for n in range(200)
        for split in ("train", "test", "validation")
    ]
    single, line = audit_examples(twice, SETTINGS).refusals
    assert "are all of one problem" in single
    assert "1 of 1 problems are in more than one split, first 'p0'" in line
    fine = examples("carry", ["0", "1"] * 100)
    problems = {
        e.problem_id: Problem(id=e.problem_id, question=f"question {e.problem_id}", answer="1", dataset="d", revision="1") for e in fine
    }
    assert audit_examples(fine, SETTINGS, problems=problems).refusals == []
    problems["p2"] = problems["p2"].model_copy(update={"question": "Question  p0"})  # p0 is trained on, p2 validates
    [line] = audit_examples(fine, SETTINGS, problems=problems).refusals
    assert "first 'p0' and 'p2'" in line


def test_empty_and_cut_off_targets_are_refused():
    good = [f"It turns on step {n}." for n in range(100)]
    assert "1 of 101 targets are empty" in refusals("reasoning_summary", [*good, " "])[0]
    assert "1 of 101 targets end in mid-sentence" in refusals("reasoning_summary", [*good, "It turns on the"])[0]
    assert refusals("context_prediction", [*good, "It turns on the"]) == []  # tokens out of a text have no end


def test_a_target_that_an_answer_has_no_room_for_is_refused_and_one_that_just_fits_is_not():
    good = [f"It turns on step {n}." for n in range(100)]
    assert refusals("context_prediction", [*good, "word " * 64]) == []
    [line] = refusals("context_prediction", [*good, "word " * 65])
    assert "up to 65 tokens, but answers end at 64" in line and "train_oracle.max_new_tokens" in line
    assert refusals("context_prediction", [*good, "word " * 65], most=65) == []


def test_a_task_without_examples_and_one_with_too_few_to_test_are_refused():
    audit = audit_examples(examples("carry", ["0", "1"] * 20), SETTINGS, tasks=["carry", "sentence_class"])
    few, none = audit.refusals
    assert "too few examples (validation 10, test 10; at least 20" in few and "sentence_class: no examples at all" in none
    [summary] = audit_examples([], SETTINGS, tasks=["reasoning_summary"]).refusals
    assert "label_sentences with classes: rules or judge" in summary and "a class for at least 50% of a trace's sentences" in summary


def test_a_task_that_would_be_tested_on_one_problem_is_refused_before_it_is_trained():
    """With its hinted twin it is one problem still."""
    made = examples("carry", ["0", "1"] * 100)
    one = [e.model_copy(update={"group": "p3"}) if e.split == "test" else e for e in made]
    [line] = audit_examples(one, SETTINGS).refusals
    assert line.startswith("carry: its 50 test examples are all of one problem") and "train_oracle.examples.test_share" in line
    two = [e.model_copy(update={"group": f"g{n % 8}"}) if e.split == "test" else e for n, e in enumerate(made)]
    assert audit_examples(two, SETTINGS).refusals == []


def test_what_the_label_maker_worries_about_is_told_and_kept(caplog):
    audit = audit_examples(examples("carry", ["0", "1"] * 100), SETTINGS, warnings=["in 9 of 9 traces ..."])
    audit.require()
    assert [record.message for record in caplog.records] == ["label_sentences: in 9 of 9 traces ..."]
    assert audit.as_json()["warnings"] == ["in 9 of 9 traces ..."]


def test_what_is_refused_comes_with_the_table_and_how_to_go_on():
    audit = audit_examples(examples("carry", ["0"] * 200), SETTINGS, where="train_oracle")
    with pytest.raises(LabelError) as caught:
        audit.require()
    text = str(caught.value)
    assert "cannot be trained on" in text and "leave the task out" in text
    row = next(line for line in text.splitlines() if line.startswith("carry"))
    assert row.split() == ["carry", "100", "50", "50", "200", "1", "100.0%", "'0'"]
