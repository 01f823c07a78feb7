"""Early exit without an intermediate answer: give up on a sample whose score falls, and draw the next one of the same problem.

An unfinished trace has no answer, so a monitor can only save tokens by abandoning. The policy is sequential: the samples of a
problem are read in turn; at every sentence's end (and at the trace's own) a sample whose score is below a threshold is
abandoned, what it has cost is paid, and the next one starts; the first that is not abandoned gives the answer, and the last
one always does. Costs are whole tokens, counted up to the token at which the sentence is known to have ended.

P problems, T thresholds, S looks at one sample
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tribunal.core.stats import Estimate, Resamples

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

THRESHOLDS = 41
MONITOR, AT_THE_END, RANDOM = "monitor", "monitor at the end only", "random_choice"


@dataclass(frozen=True)
class Sample:
    """One finished sample as a policy meets it.

    Attributes:
        right: its answer is correct.
        answered: it has an answer; one without is never accepted while there are other samples.
        looks_S: tokens paid at each look; the last one is the whole completion.
        scores: by policy, the score at each look, [S].
    """

    right: bool
    answered: bool
    looks_S: Ints
    scores: Mapping[str, Floats]

    @property
    def tokens(self) -> int:
        return int(self.looks_S[-1])


Outcome = tuple[Floats, Floats]
"""By threshold: the chance that a sample is accepted, and the tokens that it costs on average, each [T]."""


def by_threshold(sample: Sample, scores_S: Floats, thresholds_T: Floats) -> Outcome:
    """A sample is abandoned at its first look with a score below the threshold."""
    below_ST = scores_S[:, None] < thresholds_T
    abandoned_T = below_ST.any(0)
    cost_T = np.where(abandoned_T, sample.looks_S[below_ST.argmax(0)], sample.tokens)
    return (~abandoned_T & sample.answered).astype(float), cost_T.astype(float)


def at_random(sample: Sample, hazards_T: Floats) -> Outcome:
    """A sample is abandoned at each look with a fixed chance; expectations, so nothing is drawn."""
    still_ST = (1 - hazards_T) ** np.arange(len(sample.looks_S))[:, None]  # not abandoned before this look
    kept_T = (1 - hazards_T) ** len(sample.looks_S)
    cost_T = (still_ST * hazards_T * sample.looks_S[:, None]).sum(0) + kept_T * sample.tokens
    return kept_T * sample.answered, cost_T


def in_turn(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """Expected tokens and chance of a right answer of one problem, [T] each: the mean over starting with each sample."""
    n = len(samples)
    tokens_T, right_T = np.zeros_like(outcomes[0][0]), np.zeros_like(outcomes[0][0])
    for start in range(n):
        reached_T = np.ones_like(tokens_T)
        for i in (*range(start, n), *range(start)):
            last = i == (start - 1) % n
            accept_T, cost_T = (np.ones_like(tokens_T), np.full_like(tokens_T, samples[i].tokens)) if last else outcomes[i]
            tokens_T += reached_T * cost_T / n
            right_T += reached_T * accept_T * samples[i].right / n
            reached_T = reached_T * (1 - accept_T)
    return tokens_T, right_T


@dataclass(frozen=True)
class Curve:
    """One policy over its thresholds: ``tokens_PT`` and ``right_PT`` by problem."""

    thresholds_T: Floats
    tokens_PT: Floats
    right_PT: Floats


@dataclass(frozen=True)
class Chosen:
    """A policy whose threshold was chosen for each fold on the other folds: tokens and chance of a right answer, [P].

    ``threshold_of_fold`` lacks the folds in which no threshold would do.
    """

    tokens_P: Floats
    right_P: Floats
    threshold_of_fold: dict[int, float]


class EarlyExit:
    """All policies on the same problems and samples.

    Args:
        problems: ids; those with one sample have nothing to draw next and must be left out.
        samples: of each problem, in the order of their numbers.
        folds_P: problems of one fold are judged by thresholds that were chosen on the others.
        policies: names of the scores to threshold, ``MONITOR`` among them.
    """

    def __init__(
        self,
        problems: Sequence[str],
        samples: Sequence[Sequence[Sample]],
        folds_P: Ints,
        policies: Sequence[str],
        *,
        resamples: int,
        seed: int,
    ) -> None:
        assert all(len(group) > 1 for group in samples)
        self.problems, self.samples, self.folds, self.policies = list(problems), samples, folds_P, list(policies)
        self._resamples = Resamples(self.problems, resamples, seed)
        self._clusters = self._resamples.index(self.problems)
        self.one_P = np.array([np.mean([sample.tokens for sample in group]) for group in samples])
        self.right_P = np.array([np.mean([sample.right for sample in group]) for group in samples])

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Every policy over its own thresholds, from "never abandon" up to "always"."""
        found = {name: self._by_threshold(name) for name in self.policies}
        found[AT_THE_END] = self._at_the_end(self._quantiles(np.array([s.scores[MONITOR][-1] for group in self.samples for s in group])))
        hazards_T = np.linspace(0, 1, THRESHOLDS)
        found[RANDOM] = self._curve(hazards_T, lambda sample: at_random(sample, hazards_T))
        return found

    def _by_threshold(self, policy: str) -> Curve:
        thresholds_T = self._quantiles(np.array([s.scores[policy].min() for group in self.samples for s in group]))
        return self._curve(thresholds_T, lambda sample: by_threshold(sample, sample.scores[policy], thresholds_T))

    def _at_the_end(self, thresholds_T: Floats) -> Curve:
        return self._curve(thresholds_T, lambda s: by_threshold(replace(s, looks_S=s.looks_S[-1:]), s.scores[MONITOR][-1:], thresholds_T))

    def _quantiles(self, lowest_N: Floats) -> Floats:
        """Of the samples' lowest scores, so that thresholds abandon evenly spaced shares (the first none); no label is used."""
        return np.quantile(lowest_N, np.linspace(0, 1, THRESHOLDS))

    def _curve(self, thresholds_T: Floats, outcome: Callable[[Sample], Outcome]) -> Curve:
        pairs = [in_turn(group, [outcome(sample) for sample in group]) for group in self.samples]
        return Curve(thresholds_T, *(np.array(column) for column in zip(*pairs)))

    def within_budget(self, policy: str, budget: float) -> Chosen:
        """The most accurate threshold that costs at most ``budget`` x the tokens of one sample, on the other folds."""
        curve = self.curves[policy]

        def choose(known: NDArray[np.bool_]) -> int:
            tokens_T, right_T = curve.tokens_PT[known].mean(0), curve.right_PT[known].mean(0)
            affordable = tokens_T <= budget * self.one_P[known].mean() + 1e-9
            return int(np.lexsort((tokens_T, -right_T, ~affordable))[0])

        return self._chosen(curve, choose)

    def as_right_as(self, policy: str, reference: Chosen) -> Chosen:
        """The cheapest threshold that is at least as accurate as the reference on the other folds.

        Where no threshold is, the fold is left to the reference, so nothing is saved there.
        """
        curve = self.curves[policy]

        def choose(known: NDArray[np.bool_]) -> int | None:
            tokens_T, right_T = curve.tokens_PT[known].mean(0), curve.right_PT[known].mean(0)
            reached = right_T >= reference.right_P[known].mean() - 1e-12
            return int(np.argmin(np.where(reached, tokens_T, np.inf))) if reached.any() else None

        return self._chosen(curve, choose, reference)

    def _chosen(self, curve: Curve, choose: Callable[[NDArray[np.bool_]], int | None], otherwise: Chosen | None = None) -> Chosen:
        tokens_P, right_P = np.empty(len(self.problems)), np.empty(len(self.problems))
        thresholds = {}
        for fold in sorted({int(fold) for fold in self.folds}):
            ours = self.folds == fold
            place = choose(~ours)
            if place is not None:
                tokens_P[ours], right_P[ours] = curve.tokens_PT[ours, place], curve.right_PT[ours, place]
                thresholds[fold] = float(curve.thresholds_T[place])
            else:
                assert otherwise is not None
                tokens_P[ours], right_P[ours] = otherwise.tokens_P[ours], otherwise.right_P[ours]
        return Chosen(tokens_P, right_P, thresholds)

    def judged_at_the_end(self, threshold: float) -> Chosen:
        """Every sample is run to its end, and one that the monitor then scores below this threshold (a logit) is drawn again."""
        curve = self._at_the_end(np.array([threshold]))
        return Chosen(curve.tokens_PT[:, 0], curve.right_PT[:, 0], {int(fold): threshold for fold in np.unique(self.folds)})

    def best_of_all(self, policy: str) -> tuple[Floats, Floats]:
        """Tokens and correctness by problem when all samples are run to their ends and the highest last score answers."""
        picked = [group[int(np.argmax([s.scores[policy][-1] if s.answered else -np.inf for s in group]))] for group in self.samples]
        return np.array([sum(s.tokens for s in group) for group in self.samples], dtype=float), np.array([float(s.right) for s in picked])

    def mean(self, values_P: Floats) -> Estimate:
        """Mean over problems."""
        return self._resamples.estimate(_mean, values_P, self._clusters, self._clusters)

    def share(self, tokens_P: Floats, of_P: Floats | None = None) -> Estimate:
        """Tokens in units of what one sample costs (or of other tokens), as a ratio of sums."""
        whole = self.one_P if of_P is None else of_P
        return self._resamples.estimate(
            lambda scores, labels, weights: (weights @ scores) / (weights @ whole), tokens_P, self._clusters, self._clusters
        )


def _mean(values_N: Floats, labels_N: Ints, weights_RN: Floats) -> Floats:
    return (weights_RN @ values_N) / weights_RN.sum(1)
