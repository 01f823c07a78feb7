"""The written steps of an addition trace and where they end: shared by the tasks on the built-in reasoner's traces."""

from __future__ import annotations

from typing import NamedTuple

from tribunal.core.records import Trace, TraceLabel
from tribunal.models.reasoner import END_THINK, Step, read_completion

BOUNDARY = 1
"""Tokens of a step's boundary: the separator or the closing tag behind it."""


class WrittenStep(NamedTuple):
    """A step with the number of its column, 1 for the last digits, and the end (exclusive) of its tokens, its boundary included."""

    column: int
    step: Step
    end: int
    last: bool


def written_steps(trace: Trace, label: TraceLabel) -> list[WrittenStep]:
    """The steps of a trace in their order; empty when it is not well formed.

    A step's boundary is the separator or the closing tag behind it. A step that is redone after ``wait`` has its column's number again.
    """
    read = read_completion(f"{trace.thought}{END_THINK}{trace.response}")
    if read is None or trace.thought_end is None:
        return []
    steps = read[0]
    ends = [span.end_token for span in label.sentences if span.end_token <= trace.thought_end]
    if len(ends) != len(steps):
        return []
    found, column = [], 0
    for number, (step, end) in enumerate(zip(steps, ends)):
        column += not step.redone
        found.append(WrittenStep(column, step, end + BOUNDARY, last=number == len(steps) - 1))
    return found
