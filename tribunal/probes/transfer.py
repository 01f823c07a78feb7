"""Transfer: a probe trained on one kind of rows and tested on another, between difficulties, positions, layers or experiments.

Every entry of a matrix is cross-fitted over the same folds by problem, the diagonal too: fold k of the test rows is scored
by the probe fitted on the training rows without fold k. So the entries of a row rest on the same probes, those of a column on
the same test rows, and no problem is scored by a probe that saw it, in whichever experiment. The controls are carried over
in the same way: fitted on the training traces, applied to the test traces.

The folds' probes may sit at different heights on rows that none of them knows, so an AUROC counts the pairs of a right and a
wrong trace that the same probe scored.

N rows, D model width, F folds, P permutations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from tribunal.core import stats
from tribunal.core.errors import CorruptError, DataError
from tribunal.core.storage import sha256_file, write_atomic
from tribunal.probes import baselines
from tribunal.probes.crossfit import CrossFit, Floats, Ints, Rows, cross_fit, make_folds, to_traces
from tribunal.probes.direction import Place
from tribunal.probes.linear import TrainingSet, to_device
from tribunal.probes.training import ProbeTraining

Json = dict[str, Any]
CONTROLS = ("length", "finish", "logprob")
"""Controls with features of their own that can be carried over; majority needs no fit."""


@dataclass(frozen=True)
class Kind:
    """One kind of rows: a row and a column of a matrix.

    Attributes:
        name: as it is shown.
        experiment: whose traces; None for this experiment's.
        stratum: only traces of this one.
    """

    name: str
    experiment: str | None
    layer: int
    pooling: str
    stratum: str | None = None


@dataclass(frozen=True)
class Matrix:
    """Kinds of rows to train and to test on."""

    axis: str
    kinds: list[Kind]

    def key(self, kind: Kind) -> str:
        return f"{self.axis}/{kind.name}"


class Transfer:
    """The matrices of an experiment, and the fit of one row of one.

    Args:
        name: of this experiment.
        own: its traces, labels and activations.
        others: those of other experiments, by name.
        place: layer, pooling and kind of the probe.
        permutations: label permutations within problems.
    Attributes:
        left_out: why a kind of rows is in no matrix.
    Raises:
        DataError: another experiment has no such layer or pooling or another width, or there is nothing to transfer between.
    """

    def __init__(self, name: str, own: ProbeTraining, others: Mapping[str, ProbeTraining], place: Place, *, permutations: int) -> None:
        self.name, self.own, self.others, self.place, self.n_permutations = name, own, dict(others), place, permutations
        if place.layer not in own.activations.layers or place.pooling not in own.poolings:
            raise DataError(
                f"{own.activations.folder}: no usable rows of layer {place.layer}, {place.pooling}; there are layers "
                f"{', '.join(map(str, own.activations.layers))} and poolings {', '.join(own.poolings)}"
            )
        for other_name, other in others.items():
            self._require_alike(other_name, other)
        self.left_out: dict[str, str] = {}
        self._control_fits: dict[Any, dict[str, CrossFit]] = {}
        self._known_rows: dict[tuple[str | None, str], tuple[Rows, Ints]] = {}
        if not self.matrices:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise DataError(
                f"{own.activations.folder}: one difficulty, one pooling and one layer, nothing to transfer between"
                f"{' (' + reasons + ')' if reasons else ''}; extract more layers or poolings, or name transfer_probes.others"
            )

    def _require_alike(self, name: str, other: ProbeTraining) -> None:
        acts, mine, place = other.activations, self.own.activations, self.place
        if acts.d_model != mine.d_model:
            raise DataError(
                f"transfer_probes.others: the model of '{name}' is {acts.d_model} wide and this one's {mine.d_model}; a direction of one "
                "cannot be applied to the other: leave it out"
            )
        if place.layer not in acts.layers or place.pooling not in other.poolings:
            raise DataError(
                f"transfer_probes.others: '{name}' has no usable rows of layer {place.layer}, {place.pooling}; it has layers "
                f"{', '.join(map(str, acts.layers))} and poolings {', '.join(other.poolings)}: extract that one there, or set "
                "transfer_probes.layer and pooling"
            )

    # What is trained on what ----------------------------------------------------------------------------------------------

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The matrices with at least two kinds of rows that a probe can be trained on."""
        layer, pooling = self.place.layer, self.place.pooling
        strata = sorted({stratum for stratum in self.own.table.strata if stratum})
        found = [
            Matrix("difficulty", [Kind(stratum, None, layer, pooling, stratum) for stratum in strata]),
            Matrix("position", [Kind(name, None, layer, name) for name in self.own.poolings]),
            Matrix("layer", [Kind(f"layer {number}", None, number, pooling) for number in self.own.activations.layers]),
        ]
        if self.others:
            names: list[str | None] = [None, *self.others]
            found.append(Matrix("experiment", [Kind(name or self.name, name, layer, pooling) for name in names]))
        usable = [Matrix(matrix.axis, [kind for kind in matrix.kinds if self._usable(matrix, kind)]) for matrix in found]
        return [matrix for matrix in usable if len(matrix.kinds) > 1]

    def _usable(self, matrix: Matrix, kind: Kind) -> bool:
        rows, _ = self.rows(matrix, kind)
        labels, least = rows.labels[np.unique(rows.trace, return_index=True)[1]], self.own.settings["min_per_class"]
        right, wrong = int(labels.sum()), int((1 - labels).sum())
        reason = None
        if min(right, wrong) < least:
            reason = f"{right} correct and {wrong} incorrect traces, {least} of each are needed"
        elif len(np.unique(rows.folds)) < self.own.settings["folds"] or not _both_without_any_two_folds(rows):
            reason = f"its problems do not fill {self.own.settings['folds']} folds with both classes"
        if reason:
            self.left_out[f"{matrix.axis}, {kind.name}"] = reason
        return reason is None

    def training(self, kind: Kind) -> ProbeTraining:
        return self.own if kind.experiment is None else self.others[kind.experiment]

    def rows(self, matrix: Matrix, kind: Kind) -> tuple[Rows, Ints]:
        """What a kind's rows belong to, and their places in the stored tensor."""
        training = self.training(kind)
        rows, places = self._cell_rows(kind.experiment, kind.pooling)
        if matrix.axis == "experiment":  # folds and problems over all experiments: a problem in two of them is one
            folds, problems = self._over_all[kind.experiment]
            rows = Rows.of(rows.trace, training.table.labels, folds, problems)
        if kind.stratum is not None:
            ours = np.array([training.table.strata[trace] == kind.stratum for trace in rows.trace])
            rows, places = _only(rows, ours), places[ours]
        return rows, places

    def _cell_rows(self, experiment: str | None, pooling: str) -> tuple[Rows, Ints]:
        """Of a pooling, found once: an entry of a matrix asks for it, and the index has a line for every sentence."""
        key = experiment, pooling
        if key not in self._known_rows:
            rows, places, _ = (self.own if experiment is None else self.others[experiment]).cell_rows(pooling)
            self._known_rows[key] = rows, places
        return self._known_rows[key]

    def problems(self, matrix: Matrix) -> list[int]:
        """All problems of a matrix, as numbers: the clusters of its bootstrap."""
        return sorted({int(problem) for kind in matrix.kinds for problem in self.rows(matrix, kind)[0].problems})

    @cached_property
    def _over_all(self) -> dict[str | None, tuple[Ints, Ints]]:
        """Fold and problem number of every trace, by experiment; the same id or the same question is the same problem."""
        everyone: dict[str | None, ProbeTraining] = {None: self.own}
        everyone.update(self.others)
        keys = [
            (problem, " ".join(question.split()))
            for training in everyone.values()
            for problem, question in zip(training.table.problems, training.table.questions)
        ]
        groups = same_problems(keys)
        labels = np.concatenate([training.table.labels for training in everyone.values()])
        folds = make_folds(labels, [str(group) for group in groups], self.own.settings["folds"], self.own.seed)
        ends = np.cumsum([len(training.table) for training in everyone.values()])[:-1]
        return dict(zip(everyone, zip(np.split(folds, ends), np.split(groups, ends))))

    @property
    def planted(self) -> bool:
        """Whether any of the models was trained to carry the signal."""
        return any(training.activations.meta.model["name"].startswith("builtin:") for training in (self.own, *self.others.values()))

    @property
    def shared_problems(self) -> dict[str, int]:
        """Problems that another experiment shares with this one."""
        ours = set(self._over_all[None][1].tolist()) if self.others else set()
        return {name: len(ours & set(self._over_all[name][1].tolist())) for name in self.others}

    # One row of a matrix ------------------------------------------------------------------------------------------------

    def fit_row(self, matrix: Matrix, source: Kind, part: Path) -> Json:
        """Train on one kind of rows, score every kind; the arrays go to ``part``, the facts to the record returned."""
        training = self.training(source)
        rows, places = self.rows(matrix, source)
        acts = training.read(source.layer, source.pooling, places)
        fit = cross_fit(acts, rows, training.settings["c"], (self.place.kind,)).fits[self.place.kind]
        null = self._null(training, acts, rows, fit)
        ground = self._at_layer_0(matrix, source, rows, places)
        controls = self._controls(matrix, source, rows)
        arrays: dict[str, Floats] = {}
        for j, target in enumerate(matrix.kinds):
            theirs, target_places = self.rows(matrix, target)
            target_acts = self.training(target).read(target.layer, target.pooling, target_places)
            arrays[f"probe.{j}"] = apply(fit, target_acts, theirs)
            if null:
                permuted_PN = theirs.labels[self.training(target).permutations(theirs, self.n_permutations)]
                arrays[f"null_auroc.{j}"], arrays[f"null_pairs.{j}"] = _null_numbers(null, target_acts, theirs, permuted_PN)
            if ground is not None:
                at_zero = self.training(target).read(0, target.pooling, target_places)
                arrays[f"layer_0.{j}"] = apply(ground, at_zero, theirs)
            by_trace = _per_trace(theirs)
            for name, control in controls.items():
                facts = to_device(baselines.facts_of(name, self.training(target).table)[by_trace.trace])
                arrays[f"{name}.{j}"] = apply(control, facts, by_trace)
        write_atomic(part, save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
        facts_known = {"c": fit.c, "c_of_fold": fit.c_of_fold, "rows": len(rows.trace), "traces": len(np.unique(rows.trace))}
        return {"file": part.name, "sha256": sha256_file(part), **facts_known}

    def _at_layer_0(self, matrix: Matrix, source: Kind, rows: Rows, places: Ints) -> CrossFit | None:
        """The same probe after block 0, where it is another one and can be read everywhere."""
        everywhere = all(0 in self.training(kind).activations.layers for kind in matrix.kinds)
        if matrix.axis == "layer" or source.layer == 0 or not everywhere:
            return None
        training = self.training(source)
        acts = training.read(0, source.pooling, places)
        return cross_fit(acts, rows, training.settings["c"], (self.place.kind,)).fits[self.place.kind]

    def _controls(self, matrix: Matrix, source: Kind, rows: Rows) -> dict[str, CrossFit]:
        """Controls that every kind's traces allow, fitted on the source's; one that is constant there is left out."""
        by_trace, table = _per_trace(rows), self.training(source).table
        key = matrix.axis == "experiment", source.experiment, by_trace.trace.tobytes()
        if key not in self._control_fits:
            fits = {}
            for name in CONTROLS:
                if name == "logprob" and any(training.table.logprobs is None for training in (self.own, *self.others.values())):
                    continue
                facts = baselines.facts_of(name, table)[by_trace.trace]
                if np.ptp(facts, axis=0).any():
                    fits[name] = cross_fit(to_device(facts), by_trace, baselines.FACT_CS).fits["logistic"]
            self._control_fits[key] = fits
        return self._control_fits[key]

    def _null(self, training: ProbeTraining, acts: torch.Tensor, rows: Rows, fit: CrossFit) -> list[torch.Tensor]:
        """For each fold, ridge fitted without it on labels permuted within problems, [d_model, P]; biases change no rank."""
        if not self.n_permutations:
            return []
        permuted_PN = rows.labels[training.permutations(rows, self.n_permutations)]
        found = []
        for fold in range(training.settings["folds"]):
            mask = rows.folds != fold
            chosen = torch.as_tensor(np.flatnonzero(mask), device=acts.device)
            weights = torch.as_tensor(rows.weights[mask], device=acts.device)
            c = fit.c_of_fold[fold] if fit.c_of_fold else training.settings["c"][len(training.settings["c"]) // 2]
            columns = torch.as_tensor(permuted_PN[:, mask].T, device=acts.device)
            found.append(TrainingSet(acts[chosen], weights).ridge(columns, c))
        return [torch.cat([ridge.vectors, ridge.biases[None]]) for ridge in found]


def apply(fit: CrossFit, acts_ND: torch.Tensor, rows: Rows) -> Floats:
    """Logit of every trace of other rows, each by the probe fitted without its fold; the mean over a trace's rows."""
    vectors_FD = torch.as_tensor(fit.fold_vectors, device=acts_ND.device)
    logits_NF = (acts_ND @ vectors_FD.T).cpu().numpy() + fit.fold_biases
    logits, _ = to_traces(logits_NF[np.arange(len(rows.folds)), rows.folds], rows)
    return logits


def auroc_by_fold(folds_N: Ints) -> stats.Metric:
    """AUROC over the pairs of a right and a wrong row of one fold: those that the same probe scored."""

    def metric(scores_N: Floats, labels_N: Ints, weights_RN: Floats) -> Floats:
        wins, pairs = np.zeros(len(weights_RN)), np.zeros(len(weights_RN))
        for fold in np.unique(folds_N):
            here = folds_N == fold
            scores, labels, weights = scores_N[here], labels_N[here], weights_RN[:, here]
            of = (weights @ (labels == 1)) * (weights @ (labels == 0))
            wins += of * np.nan_to_num(stats.auroc(scores, labels, weights))
            pairs += of
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    return metric


def _null_numbers(null: list[torch.Tensor], acts_ND: torch.Tensor, rows: Rows, permuted_PN: Ints) -> tuple[Floats, Floats]:
    """AUROC and within-problem pairs of the permuted fits on other rows with permuted labels of theirs, by trace, [P] each."""
    scores_NP = np.empty((len(rows.trace), null[0].shape[1]))
    for fold, columns in enumerate(null):
        here = np.flatnonzero(rows.folds == fold)
        chosen = torch.as_tensor(here, device=acts_ND.device)
        scores_NP[here] = (acts_ND[chosen] @ columns[:-1] + columns[-1]).cpu().numpy()
    by_trace, first = _per_trace(rows), np.unique(rows.trace, return_index=True)[1]
    clusters = np.unique(by_trace.problems, return_inverse=True)[1]
    pairs, ones, by_fold = stats.same_cluster_pairs(clusters), np.ones((1, len(clusters))), auroc_by_fold(by_trace.folds)
    auroc, share = np.full(scores_NP.shape[1], np.nan), np.full(scores_NP.shape[1], np.nan)
    for p, column in enumerate(scores_NP.T):
        (means, _), labels = to_traces(column, rows), permuted_PN[p, first]
        auroc[p] = by_fold(means, labels, ones)[0]
        wins, of = stats.pair_counts(means, labels, clusters, int(clusters.max()) + 1, pairs)
        share[p] = wins.sum() / of.sum() if of.sum() else np.nan
    return auroc, share


def read_part(record: Json, parts: Path) -> dict[str, Floats]:
    """What ``fit_row`` wrote."""
    path = parts / record["file"]
    if not path.is_file() or sha256_file(path) != record["sha256"]:
        raise CorruptError(f"{path}: missing or damaged; remove the folder {parts.parent} and run transfer_probes again")
    arrays: dict[str, Floats] = load_file(path)
    return arrays


def same_problems(keys: Sequence[tuple[str, str]]) -> Ints:
    """A number for every (id, question), the same for two that share an id or a question."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for problem, question in keys:
        parent[root(("question", question))] = root(("id", problem))
    roots = [root(("id", problem)) for problem, _ in keys]
    number = {node: i for i, node in enumerate(dict.fromkeys(roots))}
    return np.array([number[node] for node in roots], dtype=np.int64)


def _both_without_any_two_folds(rows: Rows) -> bool:
    folds = np.unique(rows.folds)
    left: list[NDArray[np.bool_]] = [(rows.folds != j) & (rows.folds != k) for j, k in combinations(folds, 2)]
    return all(len(np.unique(rows.labels[mask])) == 2 for mask in left)


def _only(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    return Rows(rows.trace[mask], rows.weights[mask], rows.labels[mask], rows.folds[mask], rows.problems[mask])


def _per_trace(rows: Rows) -> Rows:
    """One row for every trace of these rows."""
    traces, first = np.unique(rows.trace, return_index=True)
    return Rows(traces, np.ones(len(traces)), rows.labels[first], rows.folds[first], rows.problems[first])
