"""Dots and intervals: where each row and its controls stand on one scale, for the small pictures in the page's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tribunal.core.records import Interval, ReportRow
from tribunal.report import words

WIDTH = 220.0
"""Of a picture, in its own units (CSS pixels where there is room)."""
MARGIN = 14.0
WANTED_TICKS = 4


@dataclass(frozen=True)
class Mark:
    """A dot and its interval, in the picture's units."""

    name: str
    text: str
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Tick:
    x: float
    text: str


@dataclass(frozen=True)
class Scale:
    """A range of values laid over the picture's width."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        return round(MARGIN + (value - self.low) / (self.high - self.low) * (WIDTH - 2 * MARGIN), 1)

    def drawn_ticks(self) -> list[Tick]:
        step = min((b - a for a, b in zip(self.ticks, self.ticks[1:])), default=1.0)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [Tick(self.x(tick), words.number(tick, digits)) for tick in self.ticks]

    def mark(self, name: str, value: float, low: float, high: float) -> Mark:
        return Mark(name, " ".join(words.interval(value, low, high)), self.x(value), self.x(low), self.x(high))


def scale(rows: Iterable[ReportRow]) -> Scale:
    """The range that holds every row and control with its interval, with a few round ticks inside."""
    numbers: list[ReportRow | Interval] = []
    for row in rows:
        numbers += [row, *row.controls]
    ends = [end for one in numbers for end in (one.value, one.low, one.high)]
    low, high = min(ends), max(ends)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, tuple(round_ticks(low, high)))


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about four of them."""
    power = math.floor(math.log10(high - low))
    found = []
    for step in (factor * 10.0**exponent for exponent in (power, power - 1) for factor in (5, 2, 1)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([number * step for number in range(first, last + 1)])
    return min(found, key=lambda ticks: abs(len(ticks) - WANTED_TICKS))


def controls_first_the_best(row: ReportRow, better: int) -> Sequence[Interval]:
    """Controls in order of their numbers, the hardest to beat first (``better``: 1 where more is better, else -1)."""
    return sorted(row.controls, key=lambda control: -better * control.value)
