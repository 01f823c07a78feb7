"""One trace as a page: its text with every sentence under its score, the score token by token, and the sentences as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tribunal import __version__
from tribunal.report.rendering import render

WIDTH, HEIGHT = 640, 140
"""Of the plot, in its own units."""
MOST_POINTS = 1000


@dataclass(frozen=True)
class Passage:
    """A piece of the completion: a sentence with P(correct) at its end, or what stands between two of them.

    Attributes:
        token: index of its last token, for a sentence.
        logprob: mean log-probability of its tokens, nats; for a sentence.
    """

    text: str
    score: float | None = None
    token: int | None = None
    logprob: float | None = None


@dataclass(frozen=True)
class TracePage:
    """What the page shows.

    Attributes:
        question: as it was asked.
        facts: (name, value) pairs under the title: model, direction, sampling.
        passages: the whole completion, in order.
        scores: P(correct) after each token.
        threshold: from which on the monitor says correct.
        outcome: one sentence on how it ended.
        planted: the model was trained to carry the signal.
    """

    title: str
    question: str
    facts: Sequence[tuple[str, str]]
    passages: Sequence[Passage]
    scores: Sequence[float]
    threshold: float
    outcome: str
    planted: bool


def build(page: TracePage) -> str:
    """The page, as HTML that makes no request."""
    sentences = [passage for passage in page.passages if passage.score is not None]
    return render(
        "trace.html.j2",
        page=page,
        sentences=sentences,
        shade=shade,
        curve=curve(page.scores),
        marks=[(x_of(passage.token or 0, len(page.scores)), y_of(passage.score or 0.0), passage) for passage in sentences],
        threshold_y=y_of(page.threshold),
        width=WIDTH,
        height=HEIGHT,
        version=__version__,
    )


def shade(score: float) -> str:
    """The class of a score's colour: ``p0`` (surely wrong) to ``p10`` (surely right)."""
    return f"p{round(10 * min(max(score, 0.0), 1.0))}"


def curve(scores: Sequence[float]) -> str:
    """Points of the plot's line; of a very long trace evenly spaced ones."""
    every = max(1, -(-len(scores) // MOST_POINTS))
    return " ".join(f"{x_of(i, len(scores)):g},{y_of(scores[i]):g}" for i in range(0, len(scores), every))


def x_of(token: int, count: int) -> float:
    return round(WIDTH * token / max(count - 1, 1), 1)


def y_of(score: float) -> float:
    return round(HEIGHT * (1 - score), 1)
