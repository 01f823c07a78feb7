"""What a running score is worth, and when: at shares of the trace, at token counts among the traces still alive there.

The score is the one of the direction fitted without the trace's problem; controls are logistic regressions cross-fitted in the
same folds, and fitted anew at every position, which the direction is not.

N traces at a position, L tokens, C curve points
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import expit, logit

from tribunal.core import reports
from tribunal.core.records import ReportRow
from tribunal.core.stats import METRICS, Estimate, Resamples
from tribunal.probes.baselines import FACT_CS
from tribunal.probes.crossfit import CrossFit, Floats, Ints, Rows, cross_fit
from tribunal.probes.early_exit import MONITOR, EarlyExit, Sample
from tribunal.probes.evaluation import MIN_PER_CLASS_IN_STRATUM
from tribunal.probes.linear import to_device
from tribunal.probes.trace_signals import Signal

METRICS_SHOWN = ("auroc", "brier", "ece")
CONTROLS = ("majority", "length", "logprob")
DESCRIPTIONS = {
    "majority": "the share of correct traces, for every trace",
    "length": "the number of tokens so far and its logarithm (a share of the trace gives its whole length away); "
    "among the traces alive at one token count it is a constant, their share of correct ones",
    "logprob": "mean and minimum log-probability of the tokens so far",
    "random_choice": "a sample is abandoned at each look with a fixed chance",
}
RECALIBRATED = "monitor, recalibrated"
CURVE = np.arange(5, 101, 5)
LOOKS_PER_TRACE = 32
"""Of a trace's looks, at most this many evenly spaced ones are fitted on when scores are recalibrated."""


def at_share(length: int, percent: int) -> int:
    """Index of the token at ``percent`` of a trace; rounded up, as the pooling ``percentile`` does."""
    return -(-percent * length // 100) - 1


@dataclass(frozen=True)
class Position:
    """All traces at one position.

    Attributes:
        traces_N: which ones are alive there.
        logits_N: the running score.
        controls: their logits, by name, [N] each.
    """

    name: str
    traces_N: Ints
    logits_N: Floats
    controls: Mapping[str, Floats]


class MonitorEvaluation:
    """All numbers of ``monitor_traces``.

    Args:
        signals: every scored trace; those without a label take part in early exit alone.
        threshold: P(correct) from which on the monitor says correct.
        percents: shares of the trace to measure at.
        positions: token counts to measure at among the traces alive; None: ten, up to the 90th percentile of the lengths.
        resamples: of problems, behind every interval.
    """

    def __init__(
        self,
        signals: Sequence[Signal],
        *,
        threshold: float,
        percents: Sequence[int],
        positions: Sequence[int] | None,
        budgets: Sequence[float],
        resamples: int,
        seed: int,
    ) -> None:
        self.everything = list(signals)
        self.signals = [signal for signal in signals if signal.label is not None]
        self.labels = np.array([signal.label for signal in self.signals], dtype=np.int64)
        self.folds = np.array([signal.fold for signal in self.signals], dtype=np.int64)
        self.strata = np.array([signal.stratum or "" for signal in self.signals])
        self.lengths = np.array([signal.length for signal in self.signals], dtype=np.int64)
        problems = [signal.problem_id for signal in self.signals]
        self._resamples = Resamples(problems, resamples, seed)
        self._clusters = self._resamples.index(problems)
        self._resampling = {"resamples": resamples, "seed": seed}
        self.threshold_logit = float(logit(threshold))
        self.percents, self.budgets = list(percents), list(budgets)
        self.positions = list(positions) if positions else self._default_positions()

    def _default_positions(self) -> list[int]:
        most = float(np.quantile(self.lengths, 0.9))
        return sorted({max(1, round(most * tenth / 10)) for tenth in range(1, 11)})

    @property
    def has_logprobs(self) -> bool:
        return all(signal.logprobs_L is not None for signal in self.everything)

    @property
    def controls(self) -> list[str]:
        return [name for name in CONTROLS if name != "logprob" or self.has_logprobs]

    # Positions ----------------------------------------------------------------------------------------------------------

    @cached_property
    def at_shares(self) -> dict[int, Position]:
        """By percent of the trace; every trace is there."""
        everyone = np.arange(len(self.signals))
        places = {percent: np.array([at_share(n, percent) for n in self.lengths]) for percent in self.percents}
        return {percent: self._position(f"{percent} % of the trace", everyone, place) for percent, place in places.items()}

    @cached_property
    def at_tokens(self) -> dict[int, Position]:
        """By number of tokens so far, among the traces that have so many."""
        alive = {position: np.flatnonzero(self.lengths >= position) for position in self.positions if position not in self.left_out}
        return {
            position: self._position(f"token {position}, traces alive", traces_N, np.full(len(traces_N), position - 1))
            for position, traces_N in alive.items()
        }

    @cached_property
    def left_out(self) -> dict[int, str]:
        """Token counts that are not measured, with the reason."""
        reasons = {position: self._unfit(np.flatnonzero(self.lengths >= position)) for position in self.positions}
        return {position: reason for position, reason in reasons.items() if reason}

    def _unfit(self, traces_N: Ints) -> str | None:
        labels, folds = self.labels[traces_N], self.folds[traces_N]
        right = int(labels.sum())
        if min(right, len(labels) - right) < MIN_PER_CLASS_IN_STRATUM or any(len(set(labels[folds == k])) < 2 for k in set(self.folds)):
            return f"{right} correct and {len(labels) - right} incorrect traces are alive, too few of each in every fold"
        return None

    def _position(self, name: str, traces_N: Ints, places_N: Ints) -> Position:
        logits_N = np.array([self.signals[i].logits_L[place] for i, place in zip(traces_N, places_N)])
        controls = {"majority": np.full(len(traces_N), _constant(self.labels)), "length": self._fit(traces_N, _length_facts(places_N))}
        if self.has_logprobs:
            facts = np.array([_logprob_facts(self.signals[i].logprobs_L)[place] for i, place in zip(traces_N, places_N)])
            controls["logprob"] = self._fit(traces_N, facts)
        return Position(name, traces_N, logits_N, controls)

    def _fit(self, traces_N: Ints, facts_NF: Floats) -> Floats:
        """Out-of-fold logits of a logistic regression on a few facts; a constant's are the share of correct ones."""
        if not np.ptp(facts_NF, axis=0).any():
            return np.full(len(traces_N), _constant(self.labels[traces_N]))
        return self._cross_fit(traces_N, facts_NF).logits

    def _cross_fit(self, trace_of_row: Ints, facts: Floats) -> CrossFit:
        rows = Rows.of(trace_of_row, self.labels, self.folds, self._clusters)
        return cross_fit(to_device(facts), rows, FACT_CS).fits["logistic"]

    def estimate(self, metric: str, traces_N: Ints, scores_N: Floats) -> Estimate:
        return self._resamples.estimate(METRICS[metric], scores_N, self.labels[traces_N], self._clusters[traces_N])

    def row(self, at: Position, metric: str, mask_N: Any = slice(None), stratum: str | None = None) -> ReportRow | None:
        """None where the metric has no value there."""
        traces_N = at.traces_N[mask_N]
        ours = self.estimate(metric, traces_N, at.logits_N[mask_N])
        if not ours.known:
            return None
        controls = {name: self.estimate(metric, traces_N, at.controls[name][mask_N]) for name in self.controls}
        rivals = () if metric == "ece" else self.controls  # a constant is calibrated
        name = f"running score, {at.name}"
        return reports.row(name, metric, ours, len(traces_N), controls=controls, rivals=rivals, stratum=stratum)

    @cached_property
    def share_rows(self) -> dict[int, list[ReportRow]]:
        return {percent: self._position_rows(at, strata=True) for percent, at in self.at_shares.items()}

    @cached_property
    def token_rows(self) -> dict[int, list[ReportRow]]:
        return {position: self._position_rows(at, strata=False) for position, at in self.at_tokens.items()}

    def _position_rows(self, at: Position, *, strata: bool) -> list[ReportRow]:
        rows = [self.row(at, metric) for metric in METRICS_SHOWN]
        for stratum in sorted({*self.strata.tolist()} - {""}) if strata else ():
            mask = self.strata[at.traces_N] == stratum
            right = int(self.labels[at.traces_N][mask].sum())
            if min(right, int(mask.sum()) - right) >= MIN_PER_CLASS_IN_STRATUM:
                rows.append(self.row(at, "auroc", mask, stratum))
        return [row for row in rows if row is not None]

    # When it is decided -------------------------------------------------------------------------------------------------

    @cached_property
    def _at_the_end(self) -> dict[str, CrossFit]:
        """Controls fitted on whole traces, as the direction is, to be applied to unfinished ones."""
        everyone = np.arange(len(self.signals))
        found = {"length": self._cross_fit(everyone, _length_facts(self.lengths - 1))}
        if self.has_logprobs:
            found["logprob"] = self._cross_fit(everyone, np.array([_logprob_facts(signal.logprobs_L)[-1] for signal in self.signals]))
        return found

    def running_control(self, name: str, signal: Signal) -> Floats:
        """Logits of a control that was fitted on whole traces of other folds, after each token of this one, [L]."""
        facts = _length_facts(np.arange(signal.length)) if name == "length" else _logprob_facts(signal.logprobs_L)
        fit = self._at_the_end[name]
        return facts @ fit.fold_vectors[signal.fold] + fit.fold_biases[signal.fold]

    @cached_property
    def decided(self) -> dict[str, Floats]:
        """Per trace, the share of it after which the verdict stays: of the monitor and of controls fitted at the end."""
        found = {MONITOR: np.array([_decided_at(s.logits_L - self.threshold_logit) for s in self.signals])}
        for name in self.controls:
            if name != "majority":
                found[name] = np.array([_decided_at(self.running_control(name, signal)) for signal in self.signals])
        return found

    @cached_property
    def decided_rows(self) -> list[ReportRow]:
        final = np.array([signal.logits_L[-1] >= self.threshold_logit for signal in self.signals])
        groups = {
            "all traces": np.ones(len(final), dtype=bool),
            "traces that it judges rightly": final == (self.labels == 1),
            "correct traces": self.labels == 1,
            "incorrect traces": self.labels == 0,
        }
        rows = []
        for name, mask in groups.items():
            if not mask.any():
                continue
            means = {key: self._mean(shares[mask], np.flatnonzero(mask)) for key, shares in self.decided.items()}
            ours = means.pop(MONITOR)
            rows.append(reports.row(f"verdict decided, {name}", "share_of_trace", ours, int(mask.sum()), controls=means, rivals=()))
        return rows

    def _mean(self, values_N: Floats, traces_N: Ints) -> Estimate:
        return self._resamples.estimate(
            lambda scores, labels, weights: _ratio(weights @ scores, weights.sum(1)),
            values_N,
            self.labels[traces_N],
            self._clusters[traces_N],
        )

    @cached_property
    def curves(self) -> dict[str, dict[str, list[Any]]]:
        """Mean P(correct) along the trace, of right and of wrong traces, with intervals."""
        found: dict[str, dict[str, list[Any]]] = {}
        for name, label in (("correct", 1), ("incorrect", 0)):
            traces = np.flatnonzero(self.labels == label)
            estimates = []
            for percent in CURVE:
                scores = expit([self.signals[i].logits_L[at_share(int(self.lengths[i]), int(percent))] for i in traces])
                estimates.append(self._mean(scores, traces))
            found[name] = {
                "percent": [int(percent) for percent in CURVE],
                "mean": [estimate.value for estimate in estimates],
                "low": [estimate.interval[0] for estimate in estimates],
                "high": [estimate.interval[1] for estimate in estimates],
            }
        return found

    # Early exit ---------------------------------------------------------------------------------------------------------

    @cached_property
    def early_exit(self) -> EarlyExit | None:
        """Policies over the samples of each problem; None where no problem has two."""
        by_problem: dict[str, list[Signal]] = {}
        for signal in self.everything:
            by_problem.setdefault(signal.problem_id, []).append(signal)
        groups = {problem: group for problem, group in by_problem.items() if len(group) > 1}
        if not groups:
            return None
        scores: dict[str, Callable[[Signal], Floats]] = {
            MONITOR: lambda signal: signal.logits_L,
            RECALIBRATED: self._recalibrated(lambda signal: signal.logits_L),
            "length": lambda signal: -np.arange(1.0, signal.length + 1),
        }
        if self.has_logprobs:
            scores["logprob"] = self._recalibrated(lambda signal: self.running_control("logprob", signal))
        samples = [[self._sample(signal, scores) for signal in group] for group in groups.values()]
        folds = np.array([group[0].fold for group in groups.values()], dtype=np.int64)
        return EarlyExit(list(groups), samples, folds, list(scores), **self._resampling)

    def _sample(self, signal: Signal, scores: Mapping[str, Callable[[Signal], Floats]]) -> Sample:
        places, looks = _looks(signal)
        return Sample(
            right=signal.verdict == "correct",
            answered=signal.verdict in ("correct", "incorrect"),
            looks_S=looks,
            scores={name: score(signal)[places] for name, score in scores.items()},
        )

    def _recalibrated(self, logits_of: Callable[[Signal], Floats]) -> Callable[[Signal], Floats]:
        """A running score made comparable between positions: a logistic regression on it, the log of the tokens so far, and their
        product, fitted at the looks of the traces of other folds."""

        def facts(logits_S: Floats, tokens_S: Floats) -> Floats:
            return np.column_stack([logits_S, np.log(tokens_S), logits_S * np.log(tokens_S)])

        trace_of_row, blocks = [], []
        for number, signal in enumerate(self.signals):
            places = _looks(signal)[0]
            places = places[np.unique(np.linspace(0, len(places) - 1, LOOKS_PER_TRACE).round().astype(int))]
            trace_of_row.append(np.full(len(places), number))
            blocks.append(facts(logits_of(signal)[places], places + 1.0))
        fit = self._cross_fit(np.concatenate(trace_of_row), np.concatenate(blocks))
        return lambda signal: (
            facts(logits_of(signal), np.arange(1.0, signal.length + 1)) @ fit.fold_vectors[signal.fold] + fit.fold_biases[signal.fold]
        )


def _looks(signal: Signal) -> tuple[Ints, Ints]:
    """Where a running trace is judged: at its sentences' ends and at its own; token indices, and tokens paid by then."""
    inner = signal.ends_S < signal.length - 1
    inner[-1:] = False  # the last sentence ends with the trace, or is followed by nothing to read
    places = np.append(signal.ends_S[inner], signal.length - 1)
    return places, np.append(signal.known_S[inner], signal.tokens)


def _length_facts(places_N: Ints) -> Floats:
    return np.column_stack([places_N + 1, np.log1p(places_N + 1)]).astype(float)


def _logprob_facts(logprobs_L: Floats | None) -> Floats:
    """Mean and minimum so far, [L, 2]."""
    assert logprobs_L is not None
    return np.column_stack([np.cumsum(logprobs_L) / np.arange(1, len(logprobs_L) + 1), np.minimum.accumulate(logprobs_L)])


def _decided_at(margins_L: Floats) -> float:
    """Share of the trace that has been read when the side that the last token is on is taken for good."""
    other = np.flatnonzero((margins_L >= 0) != (margins_L[-1] >= 0))
    return float((other[-1] + 2 if len(other) else 1) / len(margins_L))


def _constant(labels_N: Ints) -> float:
    return float(logit(labels_N.mean()))


def _ratio(above_R: Floats, below_R: Floats) -> Floats:
    return np.divide(above_R, below_R, out=np.full(len(above_R), np.nan), where=below_R > 0)
