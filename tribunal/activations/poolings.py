"""Which tokens make a row: every pooling turns a trace into spans whose residual streams are averaged.

Indices count in ``completion_ids``; only its first ``readable`` tokens may be read (no self-report, no end-of-sequence
token), and means never run over the prompt. A span of one token is that token's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tribunal.core.errors import DataError
from tribunal.core.records import Trace, TraceLabel

PERCENTILES = range(10, 101, 10)
LAST_N = 10


class PooledSpan(NamedTuple):
    """Tokens that are averaged into one row.

    ``position`` tells the rows of one trace and pooling apart: the sentence's number, the percentile, the token's
    index; 0 where there is one row. ``start_token`` to ``end_token`` (exclusive) count from the first completion
    token, so the last prompt token is -1 to 0.
    """

    position: int
    start_token: int
    end_token: int


Pooling = Callable[[Trace, TraceLabel], list[PooledSpan]]


def _last(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    return [PooledSpan(0, trace.readable - 1, trace.readable)]


def _last_10(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    return [PooledSpan(0, max(0, trace.readable - LAST_N), trace.readable)]


def _mean(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    return [PooledSpan(0, 0, trace.readable)]


def _think_end(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    if trace.thought_end is None or trace.thought_end >= trace.readable:
        return []
    return [PooledSpan(0, trace.thought_end, trace.thought_end + 1)]


def _sentence(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    for number, span in enumerate(label.sentences):
        if not 0 <= span.start_token < span.end_token <= trace.readable:
            raise DataError(
                f"trace {trace.key}: sentence {number} covers tokens {span.start_token} to {span.end_token}, outside the "
                f"{trace.readable} readable ones; the labels belong to other traces: run label_traces again"
            )
    return [PooledSpan(number, span.end_token - 1, span.end_token) for number, span in enumerate(label.sentences)]


def _percentile(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    ends = [(percent, -(-percent * trace.readable // 100)) for percent in PERCENTILES]  # rounded up, so at least one token
    return [PooledSpan(percent, end - 1, end) for percent, end in ends]


def _token(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    return [PooledSpan(index, index, index + 1) for index in range(trace.readable)]


def _prompt_end(trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    return [PooledSpan(0, -1, 0)] if trace.prompt_ids else []


POOLINGS: dict[str, Pooling] = {
    "last": _last,
    "last_10": _last_10,
    "mean": _mean,
    "think_end": _think_end,
    "sentence": _sentence,
    "percentile": _percentile,
    "token": _token,
    "prompt_end": _prompt_end,
}


def spans(pooling: str, trace: Trace, label: TraceLabel) -> list[PooledSpan]:
    """The rows of one trace under one pooling; empty when it has none (nothing readable, no closing tag, ...).

    Raises:
        DataError: the label's sentences do not fit the trace.
    """
    assert trace.key == label.key, f"trace {trace.key} with the label of {label.key}"
    if not 0 <= trace.readable <= len(trace.completion_ids):
        raise DataError(f"trace {trace.key}: readable is {trace.readable}, but the completion has {len(trace.completion_ids)} tokens")
    if pooling != "prompt_end" and trace.readable == 0:
        return []
    return POOLINGS[pooling](trace, label)
