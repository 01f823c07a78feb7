from __future__ import annotations

import pytest

from tests.traces.helpers import decode, problem, trace
from tribunal.traces.labels import Labeller, verdict_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (trace("The answer is 18."), ("correct", "18")),
        (trace("The answer is 20."), ("incorrect", "20")),
        (trace("I cannot say."), ("unparsable", None)),
        (trace("The answer is 18.", finish="length"), ("truncated", None)),
        (trace("", thought="so 18, but", closed=False), ("truncated", None)),
        (trace("", thought="so 18, but", closed=False, finish="length"), ("truncated", None)),
        (trace("\nAnswer: 18", thought="20"), ("correct", "18")),
        (trace("", thought="18"), ("unparsable", None)),
    ],
)
def test_a_trace_that_was_cut_off_is_truncated_and_never_incorrect(given, expected):
    assert verdict_of(given, problem()) == expected


def test_choices_and_continuations_are_graded_as_such():
    assert verdict_of(trace("The answer is (B)."), problem(answer="B", choices=["x", "y"])) == ("correct", "B")
    assert verdict_of(trace(" Paris is it"), problem(answer="Paris", kind="continuation")) == ("correct", "Paris")


def test_sentences_stop_where_the_readable_part_stops():
    given = trace("One. Two<sep>y").model_copy(update={"readable": len("One. Two")})
    label = Labeller(decode).label(given, problem(stratum="easy"))
    assert [(span.start_token, span.end_token) for span in label.sentences] == [(0, 4), (5, 8)]
    assert (label.gold, label.stratum, label.key) == ("18", "easy", "p/0")
