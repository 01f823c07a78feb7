"""The label of one trace: its verdict, the answer it gives, and its sentences."""

from __future__ import annotations

from collections.abc import Sequence

from tribunal.core.records import Problem, Trace, TraceLabel, Verdict
from tribunal.datasets import answers
from tribunal.traces.sentences import Decode, TokenOffsets, sentences


def verdict_of(trace: Trace, problem: Problem) -> tuple[Verdict, str | None]:
    """The verdict on a trace and the answer found in it.

    ``truncated`` when the token limit cut it off, or when its thought never closed: neither is a wrong answer.
    Otherwise the response (what follows the thought) is graded; a continuation is graded by ``grade_continuation``.
    """
    if trace.finish_reason == "length" or (trace.thought and trace.thought_end is None):
        return "truncated", None
    if problem.kind == "continuation":
        found = answers.grade_continuation(trace.response, problem.answer)
    else:
        found = answers.grade(trace.response, problem.answer, problem.choices)
    return found.verdict, found.answer


class Labeller:
    """Labels traces one by one; holds the token texts it has met.

    Args:
        decode: token ids to text, as the traces' prompt format does it.
        tags: the model's thinking tags, empty where it has none.
    """

    def __init__(self, decode: Decode, tags: Sequence[str] = ()) -> None:
        self._offsets = TokenOffsets(decode)
        self._tags = tags

    def label(self, trace: Trace, problem: Problem) -> TraceLabel:
        verdict, answer = verdict_of(trace, problem)
        text, offsets = self._offsets(trace.completion_ids[: trace.readable])
        return TraceLabel(
            problem_id=trace.problem_id,
            sample=trace.sample,
            verdict=verdict,
            answer=answer,
            gold=problem.answer,
            stratum=problem.stratum,
            sentences=sentences(text, offsets, self._tags),
        )
