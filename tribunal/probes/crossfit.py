"""Cross-fitting by problem: every score is of a row whose problem the fit has not seen, every choice is made inside the folds.

For outer fold k the choice of C (and later of layer and pooling) rests on inner scores: fold j scored by the fit on all
folds but j and k. That fit serves outer fold j as well, so F folds take F(F-1)/2 inner fits.

N rows, D model width, F folds, C values of the inverse penalty, P permutations
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_expit
from sklearn.model_selection import StratifiedGroupKFold

from tribunal.core import stats
from tribunal.probes.linear import Fit, TrainingSet, fit_platt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KINDS = ("logistic", "ridge", "diff_of_means")
Prepare = Callable[[NDArray[np.bool_]], torch.Tensor]


def make_folds(labels_N: Ints, problems: Sequence[str], n_folds: int, seed: int) -> Ints:
    """The fold of every trace: all traces of a problem in one fold, classes spread evenly."""
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(labels_N), dtype=np.int64)
    for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(labels_N)), labels_N, problems)):
        folds[held_out] = number
    return folds


@dataclass
class CrossFit:
    """One probe (or control), cross-fitted.

    Attributes:
        logits: out-of-fold logits of "correct", [n_rows].
        inner_auroc: AUROC of the inner scores on which outer fold k's choices rest, [folds].
        c_of_fold: the C chosen for each outer fold; empty where there is none to choose.
        c: the C of the final fit, chosen on the out-of-fold scores.
        vector, bias: the final fit on all rows, raw units, Platt's slope and offset folded in.
        fold_vectors, fold_biases: the same of the fit that gave outer fold k its logits, [folds, d_model] and [folds]; empty
            where the features themselves depend on the fold.
        newton_steps, last_move: the slowest fit's convergence.
    """

    logits: Floats
    inner_auroc: Floats
    c_of_fold: list[float]
    c: float | None
    vector: Floats
    bias: float
    newton_steps: int = 0
    last_move: float = 0.0
    fold_vectors: Floats = field(default_factory=lambda: np.empty((0, 0)))
    fold_biases: Floats = field(default_factory=lambda: np.empty(0))


@dataclass
class CellFit:
    """Everything fitted on one layer x pooling.

    Attributes:
        null_auroc, null_pairs: of ridge refitted on permuted labels, [permutations].
        ridge_auroc, ridge_pairs: of the same ridge on the true labels.
        random_auroc: of random directions, oriented on the training rows, [directions].
    """

    fits: dict[str, CrossFit]
    null_auroc: Floats = field(default_factory=lambda: np.empty(0))
    null_pairs: Floats = field(default_factory=lambda: np.empty(0))
    ridge_auroc: float = float("nan")
    ridge_pairs: float = float("nan")
    random_auroc: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Rows:
    """What a cell's rows belong to.

    Attributes:
        trace: index of the row's trace in the table, [n_rows].
        weights: 1 / number of rows of that trace, so that each trace counts once, [n_rows].
        labels, folds, problems: the trace's, by row; problems as numbers.
    """

    trace: Ints
    weights: Floats
    labels: Ints
    folds: Ints
    problems: Ints

    @classmethod
    def of(cls, trace: Ints, labels_T: Ints, folds_T: Ints, problems_T: Ints) -> Rows:
        counts = np.bincount(trace, minlength=len(labels_T))
        return cls(trace, 1.0 / counts[trace], labels_T[trace], folds_T[trace], problems_T[trace])

    @property
    def one_per_trace(self) -> bool:
        return bool((self.weights == 1).all())


def cross_fit(
    acts_ND: torch.Tensor | Prepare,
    rows: Rows,
    cs: Sequence[float],
    kinds: Sequence[str] = ("logistic",),
    *,
    standardise: bool = True,
    permutations_PN: Ints | None = None,
    random_directions: int = 0,
    seed: int = 0,
) -> CellFit:
    """Cross-fit probes of every kind on one matrix, with the permutation null and random directions in the same folds.

    Args:
        acts_ND: features, float64; or a function from the training mask to the features of all rows (where the
            features themselves are learned, such as TF-IDF): it is asked anew for every training set.
        cs: C grid; unused by diff_of_means.
        permutations_PN: permuted rows to take labels from (``stats.permute_within`` on traces, spread over rows).
        random_directions: how many random unit vectors (in standardised units) to score.
    """
    labels = torch.as_tensor(rows.labels, dtype=torch.float64)
    folds = range(int(rows.folds.max()) + 1)
    n_columns = {kind: 1 if kind == "diff_of_means" else len(cs) for kind in kinds}
    inner = {kind: np.full((len(folds), len(labels), n_columns[kind]), np.nan) for kind in kinds}
    outer = {kind: np.full((len(labels), n_columns[kind]), np.nan) for kind in kinds}
    steps = {kind: (0, 0.0) for kind in kinds}

    def training_set(mask: NDArray[np.bool_]) -> tuple[TrainingSet, torch.Tensor]:
        acts = acts_ND(mask) if callable(acts_ND) else acts_ND
        chosen = torch.as_tensor(np.flatnonzero(mask), device=acts.device)
        weights = torch.as_tensor(rows.weights[mask], device=acts.device)
        return TrainingSet(acts[chosen], weights, standardise=standardise), acts

    def fit_all(mask: NDArray[np.bool_], training: TrainingSet) -> dict[str, Fit]:
        ours = labels[torch.as_tensor(mask)].to(training.mean.device)
        fits = {kind: _fit(kind, training, ours, cs) for kind in kinds}
        for kind, fit in fits.items():
            steps[kind] = max(steps[kind][0], fit.newton_steps), max(steps[kind][1], fit.last_move)
        return fits

    for j, k in combinations(folds, 2):
        mask = (rows.folds != j) & (rows.folds != k)
        training, acts = training_set(mask)
        for kind, fit in fit_all(mask, training).items():
            for scored, held_for in ((j, k), (k, j)):
                inner[kind][held_for, rows.folds == scored] = _scores(fit, acts, rows.folds == scored)

    choice = {kind: [_choose(kind, inner[kind][k], rows, rows.folds != k) for k in folds] for kind in kinds}
    null = np.full((len(labels), 0 if permutations_PN is None else len(permutations_PN)), np.nan)
    ridge = np.full(len(labels), np.nan)
    random = np.full((len(labels), random_directions), np.nan)
    without: dict[str, list[tuple[Floats, float]]] = {kind: [] for kind in kinds}  # the fits behind each fold's logits
    for k in folds:
        mask, held_out = rows.folds != k, rows.folds == k
        training, acts = training_set(mask)
        for kind, fit in fit_all(mask, training).items():
            outer[kind][held_out] = _scores(fit, acts, held_out)
            if not callable(acts_ND):
                without[kind].append((fit.vectors[:, choice[kind][k]].cpu().numpy(), float(fit.biases[choice[kind][k]])))
        if permutations_PN is not None:
            c = cs[choice["ridge"][k]] if "ridge" in kinds else cs[len(cs) // 2]
            columns = np.column_stack([rows.labels, rows.labels[permutations_PN].T])[mask]
            scores = _scores(training.ridge(torch.as_tensor(columns, device=acts.device), c), acts, held_out)
            ridge[held_out], null[held_out] = scores[:, 0], scores[:, 1:]
        if random_directions:
            random[held_out] = _random_scores(training, acts, labels, mask, held_out, random_directions, seed)

    result = CellFit({})
    training, _ = training_set(np.ones(len(labels), dtype=bool))
    final = fit_all(np.ones(len(labels), dtype=bool), training)
    for kind in kinds:
        result.fits[kind] = _assemble(kind, inner[kind], outer[kind], choice[kind], final[kind], without[kind], rows, cs)
        result.fits[kind].newton_steps, result.fits[kind].last_move = steps[kind]
    if permutations_PN is not None:
        measure = _Measure(rows)
        result.ridge_auroc, result.ridge_pairs = measure(ridge, rows.labels)
        both = [measure(null[:, p], rows.labels[permuted]) for p, permuted in enumerate(permutations_PN)]
        result.null_auroc, result.null_pairs = (np.array(column) for column in zip(*both))
    result.random_auroc = np.array([_auroc(random[:, i], rows.labels, rows.weights) for i in range(random_directions)])
    return result


def to_traces(values_N: Floats, rows: Rows) -> tuple[Floats, Ints]:
    """Mean over each trace's rows, and the traces' indices."""
    traces, place = np.unique(rows.trace, return_inverse=True)
    return np.bincount(place, weights=values_N * rows.weights).astype(float), traces


def _fit(kind: str, training: TrainingSet, labels: torch.Tensor, cs: Sequence[float]) -> Fit:
    if kind == "logistic":
        return training.logistic(labels, cs)
    if kind == "diff_of_means":
        return training.diff_of_means(labels)
    assert kind == "ridge", kind
    fits = [training.ridge(labels[:, None], c) for c in cs]
    return Fit(torch.cat([fit.vectors for fit in fits], 1), torch.cat([fit.biases for fit in fits]))


def _scores(fit: Fit, acts: torch.Tensor, mask: NDArray[np.bool_]) -> Floats:
    chosen = torch.as_tensor(np.flatnonzero(mask), device=acts.device)
    return fit.scores(acts[chosen]).cpu().numpy()


def _choose(kind: str, scores_NC: Floats, rows: Rows, mask: NDArray[np.bool_]) -> int:
    """The column that does best on held-out scores: by log loss where scores are logits, else by AUROC; first on a tie."""
    labels, weights = rows.labels[mask], rows.weights[mask]
    if kind == "logistic":
        signs = (2 * labels - 1)[:, None]
        return int(np.argmax(weights @ log_expit(signs * scores_NC[mask])))
    return int(np.argmax([_auroc(column, labels, weights) for column in scores_NC[mask].T]))


def _assemble(
    kind: str,
    inner: Floats,
    outer: Floats,
    choice: list[int],
    final: Fit,
    without: list[tuple[Floats, float]],
    rows: Rows,
    cs: Sequence[float],
) -> CrossFit:
    folds = range(len(choice))
    logits = np.empty(len(rows.labels))
    inner_auroc = np.empty(len(choice))
    labels, weights = torch.as_tensor(rows.labels), torch.as_tensor(rows.weights)
    of_fold = []

    def platt(scores: Floats, mask: NDArray[np.bool_]) -> tuple[float, float]:
        if kind == "logistic":
            return 1.0, 0.0
        return fit_platt(torch.as_tensor(scores[mask]), labels[mask], weights[mask])

    for k in folds:
        held_out, known = rows.folds == k, rows.folds != k
        scores = inner[k][:, choice[k]]
        inner_auroc[k] = _auroc(scores[known], rows.labels[known], rows.weights[known])
        slope, offset = platt(scores, known)
        logits[held_out] = slope * outer[held_out, choice[k]] + offset
        of_fold += [(slope * vector, slope * bias + offset) for vector, bias in without[k : k + 1]]
    everything = np.ones(len(logits), dtype=bool)
    column = _choose(kind, outer, rows, everything)
    slope, offset = platt(outer[:, column], everything)
    has_c = kind != "diff_of_means"
    return CrossFit(
        logits=logits,
        inner_auroc=inner_auroc,
        c_of_fold=[cs[i] for i in choice] if has_c else [],
        c=cs[column] if has_c else None,
        vector=slope * final.vectors[:, column].cpu().numpy(),
        bias=slope * float(final.biases[column]) + offset,
        fold_vectors=np.array([vector for vector, _ in of_fold]) if of_fold else np.empty((0, 0)),
        fold_biases=np.array([bias for _, bias in of_fold]),
    )


def _random_scores(
    training: TrainingSet, acts: torch.Tensor, labels: torch.Tensor, mask: NDArray[np.bool_], held_out: NDArray[np.bool_], n: int, seed: int
) -> Floats:
    """Held-out projections on the same random unit vectors in every fold, each turned towards "correct" on the training rows."""
    draws = np.random.default_rng([seed, acts.shape[1]]).standard_normal((acts.shape[1], n))
    directions = torch.as_tensor(draws / np.linalg.norm(draws, axis=0), device=acts.device)
    towards = training.diff_of_means(labels[torch.as_tensor(mask)].to(acts.device)).vectors[:, 0] * training.scale
    chosen = torch.as_tensor(np.flatnonzero(held_out), device=acts.device)
    standard = (acts[chosen] - training.mean) / training.scale
    return (standard @ (directions * torch.sign(towards @ directions))).cpu().numpy()


def _auroc(scores: Floats, labels: Ints, weights: Floats) -> float:
    return float(stats.auroc(scores, labels, weights[None, :])[0])


class _Measure:
    """AUROC over rows and share of within-problem pairs over traces, for many score and label columns of the same rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        _, self.first = np.unique(rows.trace, return_index=True)
        self.problems = rows.problems[self.first]
        self.pairs = stats.same_cluster_pairs(self.problems)

    def __call__(self, scores: Floats, labels: Ints) -> tuple[float, float]:
        means, _ = to_traces(scores, self.rows)
        wins, pairs = stats.pair_counts(means, labels[self.first], self.problems, int(self.problems.max()) + 1, self.pairs)
        share = float(wins.sum() / pairs.sum()) if pairs.sum() else float("nan")
        return _auroc(scores, labels, self.rows.weights), share
