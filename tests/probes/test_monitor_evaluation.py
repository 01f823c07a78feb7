"""Where a trace is looked at, and what its controls know there."""

from __future__ import annotations

import numpy as np

from tests.tiny_traces import make_label, make_trace
from tribunal.activations.poolings import PERCENTILES, spans
from tribunal.probes.monitor_evaluation import _decided_at, _logprob_facts, _looks, at_share
from tribunal.probes.trace_signals import Signal


def signal(length: int, ends: list[int], known: list[int], tokens: int) -> Signal:
    return Signal(
        problem_id="p", sample=0, verdict="correct", label=1, stratum=None, fold=0, logits_L=np.zeros(length), logprobs_L=np.zeros(length),
        ends_S=np.array(ends), known_S=np.array(known), tokens=tokens, file="f", start=0,
    )  # fmt: skip


def test_a_share_of_the_trace_is_the_token_that_the_pooling_percentile_reads():
    for length in (1, 7, 10, 33):
        trace = make_trace("p", completion=length, readable=length)
        rows = spans("percentile", trace, make_label(trace))
        assert [at_share(length, percent) for percent in PERCENTILES] == [row.start_token for row in rows]


def test_a_trace_is_judged_at_its_sentences_ends_for_the_tokens_drawn_by_then_and_last_at_its_own_end_for_all():
    places, paid = _looks(signal(20, ends=[4, 9, 19], known=[7, 12, 23], tokens=23))
    assert places.tolist() == [4, 9, 19] and paid.tolist() == [7, 12, 23]
    places, paid = _looks(signal(20, ends=[4, 9], known=[7, 23], tokens=23))  # its last sentence ends before the text does
    assert places.tolist() == [4, 19] and paid.tolist() == [7, 23]
    places, paid = _looks(signal(20, ends=[], known=[], tokens=21))
    assert places.tolist() == [19] and paid.tolist() == [21]


def test_a_verdict_is_decided_where_the_last_sides_run_begins():
    assert _decided_at(np.array([1.0, -1, 1, 1])) == 3 / 4
    assert _decided_at(np.array([1.0, 1, 1, -1])) == 1
    assert _decided_at(np.array([-1.0, -2, -3, -1])) == 1 / 4


def test_log_probabilities_are_known_up_to_the_token_only():
    facts = _logprob_facts(np.array([-1.0, -3.0, -0.5]))
    assert facts.tolist() == [[-1, -1], [-2, -3], [-1.5, -3]]
