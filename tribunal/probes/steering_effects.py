"""What steering did: recovery of wrong traces and preservation of right ones, beside no steering and random directions.

An effect counts when steering beats both rivals. Better than random directions alone is not enough, since random
directions of some length do harm; nor is better than no steering, since any push of that length might do the same.

Shapes: T traces of one class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from tribunal.core.errors import DataError
from tribunal.core.records import Verdict
from tribunal.core.stats import Estimate, Floats, Resamples, permutation_p
from tribunal.core.work import Json
from tribunal.probes.steering import CLASSES, CONTRAST, Attempt, Condition

METRIC: dict[Verdict, str] = {"incorrect": "recovery", "correct": "preservation"}
WRONG, RIGHT = CLASSES
BROKEN = 0.1
"""A condition breaks the text when it leaves this share more attempts without an answer, or repeats this share more."""
ALPHA, POWER = 0.05, 0.8


class Outcome(NamedTuple):
    """What is measured of one attempt, or the mean over a trace's draws."""

    right: float
    broken: float  # no answer: unparsable or cut off
    repetition: float
    compression: float
    tokens: float


class Effect(NamedTuple):
    """Conditions of the probe on the traces of one class, beside their controls."""

    value: Estimate
    none: Estimate
    randoms: Estimate
    """The mean over the random directions."""
    each_random: list[Estimate]
    contrast: Estimate | None
    exact_p: float
    """Two-sided sign test by problem against no steering: McNemar's where a problem has one trace and one draw."""
    helped: int
    harmed: int
    rank_above: float
    """Share, with the add-one correction, of random directions that do as well or better."""
    rank_below: float

    @property
    def over_none(self) -> Estimate:
        return self.value.minus(self.none)

    @property
    def over_random(self) -> Estimate:
        return self.value.minus(self.randoms)


def mean_share(values_T: Floats, labels_T: NDArray[np.int64], weights_RT: Floats) -> Floats:
    """Weighted mean, [R]; a metric in the sense of ``tribunal.core.stats``. Labels are not looked at."""
    total = weights_RT.sum(1)
    return np.divide(weights_RT @ values_T, total, out=np.full(len(total), np.nan), where=total > 0)


def sign_test(differences_T: Floats, clusters_T: NDArray[np.int64]) -> tuple[float, int, int]:
    """Two-sided exact p over problems, and how many problems went up and down (ties say nothing)."""
    by_problem = np.bincount(clusters_T, differences_T)
    up, down = int((by_problem > 1e-12).sum()), int((by_problem < -1e-12).sum())
    return (float(binomtest(up, up + down).pvalue) if up + down else 1.0), up, down


def smallest_effect(n: int, discordant: float) -> float | None:
    """The smallest change of the share right that a two-sided sign test on ``n`` problems finds in 4 of 5 such runs.

    Args:
        discordant: share of problems whose outcome changes under a push without effect on the mean.
    Returns:
        in steps of 0.01; None where not even a change of all problems would be found.
    """
    k = np.arange(n + 1)
    needed = binom.isf(ALPHA / 2, k, 0.5) + 1  # of k changed problems so many must have changed for the better
    for effect in np.arange(1, 101) / 100:
        changed = max(discordant, effect)
        better = (changed + effect) / 2 / changed
        if float(binom.pmf(k, n, changed) @ binom.sf(needed - 1, k, better)) >= POWER:
            return float(effect)
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Cell:
    """Conditions whose outcomes are averaged, trace by trace, and are compared as one."""

    conditions: tuple[Condition, ...]

    @property
    def first(self) -> Condition:
        return self.conditions[0]

    def of(self, direction: str, number: int = 0) -> tuple[Condition, ...]:
        """The same with another direction; a random one stands beside both signs."""
        to = [c._replace(direction=direction, number=number) for c in self.conditions]
        return tuple(c._replace(strength=abs(c.strength)) for c in to) if direction == "random" else tuple(to)

    def without(self, layer: int) -> tuple[Condition, ...]:
        """No steering from the same tokens on."""
        return tuple(Condition(c.start, layer, "none", "none", 0.0) for c in self.conditions)


class Effects:
    """All outcomes, and every comparison between them.

    Args:
        attempts: the plan.
        records: what is known of it, by key; a condition that misses one attempt is left out as a whole.
        layer: the probe's.
        resamples, seed: of the bootstrap over problems.

    Raises:
        DataError: an attempt without steering is missing, or all random directions of a condition are.
    """

    def __init__(self, attempts: Iterable[Attempt], records: Mapping[str, Json], *, layer: int, resamples: int, seed: int) -> None:
        self.layer = layer
        rows: dict[Condition, dict[Verdict, dict[str, list[Outcome]]]] = defaultdict(lambda: {c: defaultdict(list) for c in CLASSES})
        problems: dict[Verdict, dict[str, str]] = {c: {} for c in CLASSES}
        left_out: dict[Condition, None] = {}
        for attempt in attempts:
            chosen = attempt.chosen
            problems[chosen.was][chosen.trace.key] = chosen.problem.id
            if attempt.key not in records:
                left_out[attempt.condition] = None
                continue
            rows[attempt.condition][chosen.was][chosen.trace.key].append(_outcome(records[attempt.key]))
        for condition in left_out:
            if condition.action == "none":
                raise DataError("steer: attempts without steering ended the process and were set aside; nothing can be compared with them")
            rows.pop(condition, None)
        self.left_out = list(left_out)
        self.conditions = list(rows)
        self.outcomes: dict[tuple[Condition, Verdict], Outcome] = {}  # each field an array [T]
        for condition, by_class in rows.items():
            for verdict in CLASSES:
                means_TF = np.array([np.mean(by_class[verdict][key], axis=0) for key in problems[verdict]])
                self.outcomes[condition, verdict] = Outcome(*means_TF.T)
        self._resamples = Resamples([p for verdict in CLASSES for p in problems[verdict].values()], resamples, seed)
        self._clusters = {verdict: self._resamples.index(list(problems[verdict].values())) for verdict in CLASSES}
        self.numbers = sorted({c.number for c in rows if c.direction == "random"})

    def n(self, verdict: Verdict) -> int:
        return len(self._clusters[verdict])

    def estimate(self, values_T: Floats, verdict: Verdict) -> Estimate:
        """The mean over the traces of a class, with draws of the bootstrap over problems."""
        return self._resamples.estimate(mean_share, values_T, np.zeros(len(values_T), dtype=np.int64), self._clusters[verdict])

    def values(self, conditions: Sequence[Condition], verdict: Verdict, field: str = "right") -> Floats:
        """Mean over conditions, [T]."""
        return np.mean([getattr(self.outcomes[c, verdict], field) for c in conditions], axis=0)

    def over(self, conditions: Sequence[Condition], verdict: Verdict, field: str = "right") -> Estimate:
        """Mean over conditions and over the traces of a class."""
        return self.estimate(self.values(conditions, verdict, field), verdict)

    def over_both(self, conditions: Sequence[Condition], field: str) -> Estimate:
        """Mean over conditions and over all traces, wrong and right ones."""
        values_T = np.concatenate([self.values(conditions, verdict, field) for verdict in CLASSES])
        clusters_T = np.concatenate([self._clusters[verdict] for verdict in CLASSES])
        return self._resamples.estimate(mean_share, values_T, np.zeros(len(values_T), dtype=np.int64), clusters_T)

    def has(self, conditions: Sequence[Condition]) -> bool:
        return all((c, WRONG) in self.outcomes for c in conditions)

    def randoms(self, cell: Cell) -> list[tuple[Condition, ...]]:
        """The cell under each random direction that is whole."""
        found = [conditions for number in self.numbers if self.has(conditions := cell.of("random", number))]
        if not found:
            raise DataError(
                f"steer: no random direction is left beside {cell.first.key}: their attempts ended the process and were set aside"
            )
        return found

    def effect(self, cell: Cell, verdict: Verdict, field: str = "right") -> Effect:
        value_T = self.values(cell.conditions, verdict, field)
        none_T = self.values(cell.without(self.layer), verdict, field)
        randoms = [self.values(conditions, verdict, field) for conditions in self.randoms(cell)]
        null = np.array([values.mean() for values in randoms])
        p, helped, harmed = sign_test(value_T - none_T, self._clusters[verdict])
        contrast = cell.of(CONTRAST)
        return Effect(
            value=self.estimate(value_T, verdict),
            none=self.estimate(none_T, verdict),
            randoms=self.estimate(np.mean(randoms, axis=0), verdict),
            each_random=[self.estimate(values, verdict) for values in randoms],
            contrast=self.estimate(self.values(contrast, verdict, field), verdict) if self.has(contrast) else None,
            exact_p=p,
            helped=helped,
            harmed=harmed,
            rank_above=permutation_p(float(value_T.mean()), null),
            rank_below=permutation_p(-float(value_T.mean()), -null),
        )

    @cached_property
    def cells(self) -> list[Cell]:
        """Every condition of the probe on its own."""
        return [Cell((c,)) for c in self.conditions if c.direction == "probe"]

    def breaks_text(self, conditions: Sequence[Condition]) -> bool:
        """Whether attempts under these lose their answer, or repeat themselves, clearly more than without steering."""
        none = Cell(tuple(conditions)).without(self.layer)
        more = [self.over_both(conditions, field).minus(self.over_both(none, field)) for field in ("broken", "repetition")]
        return any(estimate.value >= BROKEN and estimate.interval[0] > 0 for estimate in more)

    def only_breaks_text(self, cell: Cell) -> bool:
        """Whether the probe breaks the text there, and makes no class of traces right more often."""
        none = cell.without(self.layer)
        gains = [(self.values(cell.conditions, verdict) - self.values(none, verdict)).mean() for verdict in CLASSES]
        return self.breaks_text(cell.conditions) and max(gains) <= 0

    @cached_property
    def usable(self) -> dict[tuple[str, int, float], bool]:
        """By start, layer and length: whether random directions leave the text whole. The probe has no say in it."""
        some = [c for c in self.conditions if c.action == "add" and c.direction == "random"]
        places = {(c.start, c.layer, c.strength): Cell((c._replace(direction="probe", number=0),)) for c in some}
        return {place: not self.breaks_text([c for group in self.randoms(cell) for c in group]) for place, cell in places.items()}

    def pooled(self, layer: int, sign: int) -> Cell | None:
        """All starts and strengths of one sign that leave the text whole under random directions; all, where none does."""
        ours = [c for c in self.conditions if (c.layer, c.action, c.direction) == (layer, "add", "probe") and c.strength * sign > 0]
        whole = [c for c in ours if self.usable.get((c.start, c.layer, abs(c.strength)), False)]
        return Cell(tuple(whole or ours)) if ours else None

    def discordant(self, cell: Cell, verdict: Verdict) -> float:
        """Share of traces whose outcome changes under a random direction, mean over them."""
        none_T = self.values(cell.without(self.layer), verdict)
        return float(np.mean([np.abs(self.values(conditions, verdict) - none_T) > 1e-12 for conditions in self.randoms(cell)]))


def _outcome(record: Json) -> Outcome:
    right, broken = record["verdict"] == "correct", record["verdict"] in ("unparsable", "truncated")
    return Outcome(
        right, broken, record["repetition"], np.nan if record["compression"] is None else record["compression"], record["tokens"]
    )


def quality(effects: Effects, condition: Condition, verdict: Verdict) -> Json:
    """How the text of a condition reads, with intervals where something is claimed about it."""
    outcome: Any = effects.outcomes[condition, verdict]
    shares = {}
    for field in ("broken", "repetition"):
        estimate = effects.estimate(getattr(outcome, field), verdict)
        shares[field] = [estimate.value, *estimate.interval]
    known = outcome.compression[np.isfinite(outcome.compression)]
    return {**shares, "tokens": float(np.mean(outcome.tokens)), "compression": float(known.mean()) if len(known) else None}
