"""Traces and labels for the tiny models, made in code."""

from __future__ import annotations

import random

from tribunal.core.records import Span, Trace, TraceLabel

VOCABULARY = 97  # of tests.tiny_models.tiny_model


def make_trace(
    problem: str, sample: int = 0, *, prompt: int = 5, completion: int = 20, readable: int | None = None, thought_end: int | None = None
) -> Trace:
    draw = random.Random(f"{problem}/{sample}")
    return Trace(
        problem_id=problem,
        sample=sample,
        prompt_ids=[draw.randrange(VOCABULARY) for _ in range(prompt)],
        completion_ids=[draw.randrange(VOCABULARY) for _ in range(completion)],
        logprobs=[-1.0] * completion,
        finish_reason="stop",
        seed=0,
        readable=max(0, completion - 1) if readable is None else readable,
        thought="",
        thought_end=thought_end,
        response="",
        model="tiny@0",
        template_sha256="0" * 64,
    )


def make_label(trace: Trace, sentences: list[tuple[int, int]] | None = None, verdict: str = "correct") -> TraceLabel:
    """By default sentences of seven tokens, the last one as long as it happens to be."""
    if sentences is None:
        sentences = [(start, min(start + 7, trace.readable)) for start in range(0, trace.readable, 7)]
    return TraceLabel(
        problem_id=trace.problem_id,
        sample=trace.sample,
        verdict=verdict,
        answer="1",
        gold="1",
        stratum=None,
        sentences=[Span(start_char=start, end_char=end, start_token=start, end_token=end) for start, end in sentences],
    )


def make_pairs(count: int, *, seed: int = 0) -> list[tuple[Trace, TraceLabel]]:
    """Traces of 4 to 60 tokens, every third with a closed thought."""
    draw = random.Random(seed)
    traces = []
    for number in range(count):
        length = draw.randint(4, 60)
        traces.append(
            make_trace(
                f"p{number // 2}", number % 2, prompt=draw.randint(1, 9), completion=length, thought_end=length // 2 if number % 3 else None
            )
        )
    return [(trace, make_label(trace, verdict=draw.choice(["correct", "incorrect"]))) for trace in traces]
