"""Which tokens every pooling reads."""

from __future__ import annotations

import pytest

from tests.tiny_traces import make_label, make_trace
from tribunal.activations.poolings import POOLINGS, spans
from tribunal.core.errors import DataError

TRACE = make_trace("p", prompt=3, completion=14, readable=12, thought_end=6)
LABEL = make_label(TRACE, [(0, 5), (5, 9), (9, 12)])


def read(pooling, trace=TRACE, label=None):
    return [
        tuple(span) for span in spans(pooling, trace, label or make_label(trace, [(0, 5), (5, 9), (9, 12)] if trace.readable >= 12 else []))
    ]


def test_last_and_means_stop_at_the_last_readable_token():
    assert read("last") == [(0, 11, 12)]
    assert read("last_10") == [(0, 2, 12)]
    assert read("mean") == [(0, 0, 12)]


def test_last_10_of_a_short_completion_takes_all_of_it():
    assert read("last_10", make_trace("p", completion=5, readable=4)) == [(0, 0, 4)]


def test_a_sentence_row_is_its_last_token_and_keeps_its_number():
    assert read("sentence") == [(0, 4, 5), (1, 8, 9), (2, 11, 12)]


def test_percentiles_end_on_the_last_readable_token_and_start_on_a_real_one():
    assert read("percentile") == [
        (10, 1, 2),
        (20, 2, 3),
        (30, 3, 4),
        (40, 4, 5),
        (50, 5, 6),
        (60, 7, 8),
        (70, 8, 9),
        (80, 9, 10),
        (90, 10, 11),
        (100, 11, 12),
    ]
    assert read("percentile", make_trace("p", completion=1, readable=1)) == [(percent, 0, 1) for percent in range(10, 101, 10)]


def test_tokens_are_the_readable_ones_and_the_prompt_end_is_just_before_them():
    assert read("token") == [(i, i, i + 1) for i in range(12)]
    assert read("prompt_end") == [(0, -1, 0)]


@pytest.mark.parametrize("thought_end", [None, 12])
def test_think_end_gives_no_row_when_the_thought_never_closed_or_closed_after_the_readable_part(thought_end):
    assert read("think_end") == [(0, 6, 7)]
    assert read("think_end", make_trace("p", completion=14, readable=12, thought_end=thought_end)) == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_trace_with_nothing_readable_has_a_prompt_and_nothing_else(pooling):
    assert len(read(pooling, make_trace("p", completion=1, readable=0))) == (pooling == "prompt_end")


def test_sentences_of_another_trace_are_refused_by_name():
    with pytest.raises(DataError, match=r"trace p/0: sentence 1 covers tokens 5 to 13, outside the 12 readable"):
        spans("sentence", TRACE, make_label(TRACE, [(0, 5), (5, 13)]))
