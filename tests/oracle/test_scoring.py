"""Scores of answers, against scikit-learn and cases worked out by hand."""

from __future__ import annotations

import pytest

from tribunal.oracle.scoring import constancy, exact, fuzzy, named_choice, normalise, word_f1, yes_no
from tribunal.oracle.tasks.sentence_class import WORDS
from tribunal.traces.sentence_labels import TIERS


@pytest.mark.parametrize(
    ("answer", "class_name"),
    [
        ("Self-Checking.", "self checking"),
        ("the active_computation", "active computation"),
        ("This sentence is a verification.", "self checking"),
        ("It does arithmetic", "active computation"),
        ("Final answer", "final answer emission"),
        ("plan generation or fact retrieval", None),
        ("not plan generation", None),
        ("poetry", None),
        ("", None),
    ],
)
def test_a_class_is_recognised_by_its_name_case_articles_and_near_synonyms_and_only_where_one_is_named(answer, class_name):
    for target in WORDS:
        assert fuzzy("sentence_class", answer, target, WORDS) == float(target == class_name)


@pytest.mark.parametrize(
    ("answer", "tier"),
    [
        ("very important", "high"),
        ("unimportant", "low"),
        ("important", "high"),
        ("It is crucial!", "critical"),
        ("It is less important than others", "low"),
        ("hardly important", "low"),
        ("moderately important", "medium"),
    ],
)
def test_a_name_inside_a_longer_one_does_not_count(answer, tier):
    assert [t for t in TIERS if fuzzy("sentence_importance", answer, t, TIERS)] == [tier]


def test_numbers_are_compared_whole():
    assert named_choice("1", ["1", "10"]) == "1" and named_choice("It is 10.", ["1", "10"]) == "10"
    assert named_choice("-1", ["1", "-1"]) == "-1"
    assert normalise("The 1.50, a B_c-d!") == "1.50 b c d"
    for answer in ("-3", "It is -3", "2.2", "3%", "1.5 or so", "about .5", "3-4"):
        assert named_choice(answer, [str(digit) for digit in range(10)]) is None, answer
    for answer in ("3.", "(3)", "**3**", "=3", "digit: 3", "x-3"):
        assert named_choice(answer, [str(digit) for digit in range(10)]) == "3", answer


@pytest.mark.parametrize(
    ("answer", "choices", "named"),
    [
        ("0, no carry", ["0", "1"], "0"),
        ("1 and not 0", ["0", "1"], None),
        ("It is not 1", ["0", "1"], None),
        ("There was none, no", ["yes", "no"], "no"),
        ("Not at all.", ["not at all", "a lot"], "not at all"),
        ("low, not high", ["low", "high"], None),
        ("1 is not carried", ["0", "1"], None),
        ("High? Not at all.", ["low", "high"], None),
        ("high is not what I would say", ["low", "high"], None),
        ("High: no sentence matters more", ["low", "high"], "high"),
        ("The 0; not carried", ["0", "1"], "0"),
        ("1.5, not more", ["1", "2"], None),
        ("No, it is not.", ["yes", "no"], "no"),
    ],
)
def test_a_denial_names_nothing_unless_it_begins_with_a_choice_and_a_stop_or_a_choice_is_one(answer, choices, named):
    assert named_choice(answer, choices) == named


def test_exact_forgives_blanks_at_the_ends_and_nothing_else():
    assert exact(" yes\n", "yes") and not exact("Yes", "yes")


SAID = {
    "Yes.": "yes",
    "No, it is not.": "no",
    "no, it is not": "no",
    "TRUE": "yes",
    "Incorrect": "no",
    "maybe": None,
    "": None,
    "The answer is yes": None,
    "N/A": None,
    "No idea.": None,
    "No way to tell": None,
    "Yes or no": None,
    "Yes/No": None,
    "Yes, and no doubt": "yes",
    "No one did.": "no",
}


@pytest.mark.parametrize(("text", "said"), SAID.items())
def test_yes_and_no_are_read_from_the_first_word(text, said):
    assert yes_no(text) == said
    assert fuzzy("correctness", text, "yes", ["yes", "no"]) == float(said == "yes")


def test_open_answers_get_the_f1_of_their_words_each_as_often_as_it_occurs():
    assert word_f1("the cat sat", "A cat sat down") == pytest.approx(0.8)  # 2 of 2 said, 2 of 3 wanted
    assert word_f1("cat cat cat", "cat sat") == pytest.approx(0.4)  # a repeated word counts once here
    assert word_f1("", "") == 1.0 and word_f1("", "cat") == 0.0
    assert word_f1(" The", "the") == 1.0 and word_f1(",", ", ") == 1.0
    assert word_f1("", ",") == word_f1("a", "the") == word_f1(".", "!") == word_f1("", "the") == 0.0, "silence is no answer"
    assert fuzzy("context_prediction", "7+5=12", "7+5=12", []) == 1.0


def test_an_oracle_that_always_says_the_same_is_flagged_unless_the_right_answer_is_always_the_same():
    mixed = ["yes", "no"] * 50
    assert constancy(["Yes."] * 96 + ["no"] * 4, mixed).constant
    assert not constancy(["yes"] * 90 + ["no"] * 10, mixed).constant
    assert not constancy(["yes"] * 100, ["yes"] * 99 + ["no"]).constant
    assert constancy(["Yes."] * 100, mixed)[:3] == ("yes", 1.0, 0.5)
