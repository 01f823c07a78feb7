"""Metrics of probability forecasts with 95 % intervals from a bootstrap over clusters (problems).

A metric takes scores (logits of "correct"), labels and a stack of row weights, and returns one value per weighting: the
plain value for one weighting, the bootstrap distribution for many. Every number compared with another one uses the same
draws, so differences are paired.

N rows, R weightings (resamples), G clusters, P positives
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]
Metric = Callable[[Floats, NDArray[np.int64], Floats], Floats]

ECE_BINS = 10
CHUNK_ELEMENTS = 4_000_000


def _shared(total: Floats, part: Floats) -> Floats:
    """part / total, NaN where there is nothing to share."""
    return np.divide(part, total, out=np.full(np.broadcast(part, total).shape, np.nan), where=total > 0)


def accuracy(logits_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Share of the weight where "logit >= 0" agrees with the label, [R]."""
    return _shared(weights_RN.sum(1), weights_RN @ ((logits_N >= 0) == labels_N).astype(float))


def balanced_accuracy(logits_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Mean of the two classes' recalls, [R]."""
    recalls = []
    for label in (0, 1):
        ours = (labels_N == label).astype(float)
        recalls.append(_shared(weights_RN @ ours, weights_RN @ (ours * ((logits_N >= 0) == label))))
    return (recalls[0] + recalls[1]) / 2


def brier(logits_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Mean squared error of the probability, [R]; lower is better."""
    return _shared(weights_RN.sum(1), weights_RN @ (expit(logits_N) - labels_N) ** 2)


def auroc(scores_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Weighted probability that a positive scores above a negative, ties counting half, [R]."""
    positive = labels_N == 1
    order = np.argsort(scores_N[~positive], kind="stable")
    negatives = scores_N[~positive][order]
    below = np.zeros((len(weights_RN), len(negatives) + 1))  # below[:, i]: weight of the i lowest negatives
    np.cumsum(weights_RN[:, np.flatnonzero(~positive)[order]], axis=1, out=below[:, 1:])
    values, place = np.unique(scores_N[positive], return_inverse=True)
    beaten = below[:, np.searchsorted(negatives, values, "left")] + below[:, np.searchsorted(negatives, values, "right")]
    weights_RP = weights_RN[:, positive]
    wins = np.einsum("rp,rp->r", weights_RP, beaten[:, place]) / 2
    return _shared(weights_RP.sum(1) * below[:, -1], wins)


def ece(logits_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats, *, n_bins: int = ECE_BINS) -> Floats:
    """Expected calibration error over bins of equal mass, [R]; lower is better.

    Bins are quantiles of the probability under each weighting; equal probabilities share a bin, and 0 and 1 are counted
    like any other. Resampling noise adds to a distance, so the bootstrap's draws are shifted back around the value.
    """
    order = np.argsort(logits_N, kind="stable")
    logits, labels, weights = logits_N[order], labels_N[order], weights_RN[:, order]
    starts = np.flatnonzero(np.diff(logits, prepend=-np.inf))  # of the blocks of equal probability
    gaps = weights * (expit(logits) - labels)
    if len(starts) < len(logits):
        weights, gaps = np.add.reduceat(weights, starts, axis=1), np.add.reduceat(gaps, starts, axis=1)
    up_to = np.cumsum(weights, axis=1)
    total = up_to[:, -1].copy()
    up_to -= weights / 2  # a block belongs to the bin that its middle falls into
    below = np.zeros((len(gaps), gaps.shape[1] + 1))
    np.cumsum(gaps, axis=1, out=below[:, 1:])
    edges = np.arange(1, n_bins) / n_bins
    cuts = np.stack([np.searchsorted(row, edges * mass) for row, mass in zip(up_to, total)])
    ends = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, gaps.shape[1])))
    per_bin = np.diff(np.take_along_axis(below, ends, axis=1), axis=1)
    return _shared(total, np.abs(per_bin).sum(1))


METRICS: Mapping[str, Metric] = {"auroc": auroc, "accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "brier": brier, "ece": ece}
LOWER_IS_BETTER = frozenset({"brier", "ece", "share_of_trace", "tokens_in_traces"})
"""Names of metrics, those that single jobs report too."""
WITHIN_PROBLEM_PAIRS = "within_problem_pairs"


def same_cluster_pairs(clusters_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row indices (i, j) of every pair of rows of one cluster, each pair once."""
    order = np.argsort(clusters_N, kind="stable")
    left, right = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for rows in np.split(order, np.flatnonzero(np.diff(clusters_N[order])) + 1):
        i, j = np.triu_indices(len(rows), 1)
        left.append(rows[i])
        right.append(rows[j])
    return np.concatenate(left), np.concatenate(right)


def pair_counts(
    scores_N: Floats,
    labels_N: NDArray[np.int64],
    clusters_N: NDArray[np.int64],
    n_clusters: int,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[Floats, Floats]:
    """Pairs of a right and a wrong sample of one problem: pairs won by the right one (ties half) and pairs, each [G].

    Args:
        pairs: ``same_cluster_pairs(clusters_N)``, where it is asked for often.
    """
    i, j = same_cluster_pairs(clusters_N) if pairs is None else pairs
    towards = labels_N[i] - labels_N[j]
    i, j, towards = i[towards != 0], j[towards != 0], towards[towards != 0]
    won = (np.sign(scores_N[i] - scores_N[j]) * towards + 1) / 2
    return np.bincount(clusters_N[i], won, n_clusters).astype(float), np.bincount(clusters_N[i], minlength=n_clusters).astype(float)


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap draws (same draws for everything from one ``Resamples``)."""

    value: float
    draws: Floats

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Percentile interval, 95 %; draws without a value (one class only) are left out."""
        known = self.draws[np.isfinite(self.draws)]
        if not len(known):
            return self.value, self.value
        low, high = np.quantile(known, [0.025, 0.975])
        return float(low), float(high)

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def negated(self) -> Estimate:
        return Estimate(-self.value, -self.draws)

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.value))


class Resamples:
    """A bootstrap over clusters: the rows of a cluster are drawn together, as often as the cluster is.

    Args:
        clusters: all clusters (problem ids), in a fixed order.
        n: number of resamples.
        seed: of the draws.
    """

    def __init__(self, clusters: Sequence[Hashable], n: int, seed: int) -> None:
        self.place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
        size = len(self.place)
        self.counts_RG = np.random.default_rng([seed, size]).multinomial(size, np.full(size, 1 / size), size=n).astype(float)

    def index(self, clusters_of_rows: Sequence[Hashable]) -> NDArray[np.int64]:
        """Cluster numbers of rows."""
        return np.array([self.place[cluster] for cluster in clusters_of_rows], dtype=np.int64)

    def estimate(
        self,
        metric: Metric,
        scores_N: Floats,
        labels_N: NDArray[np.int64],
        clusters_N: NDArray[np.int64],
        weights_N: Floats | None = None,
    ) -> Estimate:
        """A metric's value and its bootstrap draws.

        Args:
            clusters_N: from ``index``.
            weights_N: weight of each row (rows of one trace share a weight of 1); None for ones.
        """
        weights = np.ones(len(scores_N)) if weights_N is None else weights_N
        if len(scores_N) == 0:
            return Estimate(float("nan"), np.full(len(self.counts_RG), np.nan))
        value = float(metric(scores_N, labels_N, weights[None, :])[0])
        chunks = [metric(scores_N, labels_N, counts[:, clusters_N] * weights) for counts in self._chunks(len(scores_N))]
        draws = np.concatenate(chunks)
        if metric is ece and np.isfinite(draws).any():
            draws = np.maximum(draws + (value - np.nanmean(draws)), 0)
        return Estimate(value, draws)

    def pairs(self, scores_N: Floats, labels_N: NDArray[np.int64], clusters_N: NDArray[np.int64]) -> Estimate:
        """Share of within-problem pairs in which the right sample scores above the wrong one."""
        wins, pairs = pair_counts(scores_N, labels_N, clusters_N, self.counts_RG.shape[1])
        value = float(wins.sum() / pairs.sum()) if pairs.sum() else float("nan")
        return Estimate(value, _shared(self.counts_RG @ pairs, self.counts_RG @ wins))

    def _chunks(self, n_rows: int) -> Iterator[Floats]:
        size = max(1, CHUNK_ELEMENTS // n_rows)
        for start in range(0, len(self.counts_RG), size):
            yield self.counts_RG[start : start + size]


def permute_within(clusters_N: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """``n`` permutations of the rows that keep every row in its cluster, [n, N] (indices to take)."""
    rng = np.random.default_rng([seed, len(clusters_N)])
    home = np.argsort(clusters_N, kind="stable")
    result = np.empty((n, len(clusters_N)), dtype=np.int64)
    for row in result:
        row[home] = np.lexsort((rng.random(len(clusters_N)), clusters_N))
    return result


def permutation_p(real: float, null: Floats) -> float:
    """One-sided p of "the real value is no larger than under permuted labels", with the add-one correction."""
    return float((1 + np.sum(null >= real - 1e-12)) / (1 + len(null)))
