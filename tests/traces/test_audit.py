from __future__ import annotations

import pytest

from tests.traces.helpers import problem, trace
from tribunal.core.errors import LabelError
from tribunal.core.records import TraceLabel
from tribunal.traces.audit import Facts, audit, cross_check, require_both_classes
from tribunal.traces.labels import verdict_of


def rows(**counts):
    return [
        Facts(f"p{number % 7}", verdict, f"{number % 2} digits", 10 + number, "length" if verdict == "truncated" else "stop")
        for verdict, count in counts.items()
        for number in range(count)
    ]


def test_counts_lengths_and_endings_are_given_by_class_and_stratum():
    result = audit(rows(correct=30, incorrect=20, truncated=1))
    assert result["verdicts"]["correct"] == {
        "count": 30,
        "share": round(30 / 51, 6),
        "tokens_mean": 24.5,
        "tokens_median": 24.5,
        "finish": {"stop": 30, "length": 0},
    }
    assert result["verdicts"]["truncated"]["finish"] == {"stop": 0, "length": 1}
    assert result["strata"]["1 digits"]["incorrect"]["count"] == 10
    assert (result["traces"], result["problems"], result["problems_with_both"]) == (51, 7, 7)
    assert result["verdicts"]["unparsable"]["tokens_mean"] is None


def test_more_than_two_percent_truncated_is_the_first_thing_the_audit_says():
    assert next(iter(audit(rows(correct=30)))) == "warnings"
    assert audit(rows(correct=98, incorrect=0, truncated=2))["warnings"] == []
    (warning,) = audit(rows(correct=97, truncated=3))["warnings"]
    assert "3 of 100 traces (3.0%) are truncated" in warning and "max_new_tokens" in warning


def test_classes_of_unequal_length_are_warned_about():
    facts = [Facts("p", "correct", None, 10, "stop"), Facts("q", "incorrect", None, 100, "stop")]
    (warning,) = audit(facts)["warnings"]
    assert "length baseline" in warning


def test_a_class_that_is_too_small_is_refused_in_one_line_with_the_counts():
    require_both_classes(rows(correct=20, incorrect=20), 20)
    with pytest.raises(LabelError) as caught:
        require_both_classes(rows(correct=500, incorrect=19, unparsable=3, truncated=7), 20)
    message = str(caught.value)
    assert "\n" not in message
    assert "500 correct, 19 incorrect, 3 unparsable, 7 truncated" in message and "min_per_class" in message and "harder" in message
    with pytest.raises(LabelError, match="0 correct"):
        require_both_classes([], 1)


def test_rows_on_which_two_graders_differ_are_listed():
    texts = ["The answer is 18.", "The answer is 20.", "cut", "(B)"]
    problems = [problem(), problem(), problem(), problem(answer="B", choices=["x", "y"])]
    traces = [trace(text, sample=number) for number, text in enumerate(texts)]
    traces[2] = traces[2].model_copy(update={"finish_reason": "length"})
    pairs = []
    for one, its in zip(traces, problems):
        verdict, answer = verdict_of(one, its)
        pairs.append(
            (
                one,
                its,
                TraceLabel(problem_id="p", sample=one.sample, verdict=verdict, answer=answer, gold=its.answer, stratum=None, sentences=[]),
            )
        )
    result = cross_check(pairs, grader=lambda response, gold: "incorrect")
    assert (result["checked"], result["agree"]) == (2, 1)
    assert [row["sample"] for row in result["differing"]] == [0]
    assert cross_check(pairs)["agree"] == 2
