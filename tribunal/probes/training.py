"""From result folders to trained probes: what the job ``train_probes`` does, without knowing that it is a job.

A unit's arrays go to one safetensors part, its small facts to the record returned; ``publish`` reads both back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file, save

import tribunal
from tribunal.activations.store import ActivationSet
from tribunal.core import stats
from tribunal.core.errors import CorruptError, DataError, LabelError
from tribunal.core.receipts import read_receipt
from tribunal.core.reports import plain, write_report
from tribunal.core.storage import canonical_json, sha256_file, sha256_json, write_atomic
from tribunal.probes import baselines, direction, figures, held_out
from tribunal.probes.crossfit import CellFit, CrossFit, Floats, Ints, Rows, cross_fit, make_folds
from tribunal.probes.direction import FILE_NAME, short
from tribunal.probes.evaluation import Cell, Evaluation
from tribunal.probes.linear import LOGIT_TOLERANCE, to_device
from tribunal.probes.table import read_table, require_classes

Json = dict[str, Any]
Row = TypeVar("Row")
OF_A_FIT = ("logits", "inner_auroc", "vector", "fold_vectors", "fold_biases")
POOLING_TEXT = {
    "last": "last readable completion token",
    "last_10": "mean over the last 10 readable completion tokens",
    "mean": "mean over the readable completion tokens",
    "think_end": "last token of the closing thinking tag",
    "sentence": "last token of each sentence",
    "percentile": "token at 10, 20, ..., 100 % of the readable completion",
    "token": "each readable completion token",
    "prompt_end": "last prompt token, before anything was generated",
}


class ProbeTraining:
    """The inputs of the probes, and the fit of one unit.

    Args:
        traces, labels, activations: result folders.
        settings: the job's section, as a plain dict.
    Raises:
        LabelError: a class has too few traces or problems.
        DataError: the activations belong to other traces.
    """

    def __init__(self, *, traces: Path, labels: Path, activations: Path, settings: Mapping[str, Any], seed: int) -> None:
        self.settings, self.seed = dict(settings), seed
        self.activations = ActivationSet.open(activations)
        self.table = read_table(traces, labels, truncated_as_incorrect=settings["truncated"] == "incorrect", extracted=self._extracted())
        require_classes(
            self.table.labels,
            self.table.problems,
            min_per_class=settings["min_per_class"],
            folds=settings["folds"],
            where=str(labels / "labels.jsonl"),
        )
        self.folds = make_folds(self.table.labels, self.table.problems, settings["folds"], seed)
        if not _both_in_every_fold(self.table.labels, self.folds, settings["folds"]):
            raise LabelError(
                f"{labels / 'labels.jsonl'}: with {settings['folds']} folds by problem one of them holds a single class; "
                "set fewer train_probes.folds, or sample more problems"
            )
        place = {problem: i for i, problem in enumerate(dict.fromkeys(self.table.problems))}
        self.problem_numbers = np.array([place[problem] for problem in self.table.problems], dtype=np.int64)
        self.controls = baselines.available(self.table)

    def _extracted(self) -> set[tuple[str, int]] | None:
        """The traces that have activations, where extraction had to set shards aside; None: all of them."""
        receipt = read_receipt(self.activations.folder)
        if receipt is None or not receipt.get("set_aside"):
            return None
        return {(row.problem_id, row.sample) for pooling in self.activations.poolings for row in self.activations.rows(pooling)}

    @cached_property
    def poolings(self) -> list[str]:
        """Poolings with rows of enough traces; ``left_out`` names the others with the reason."""
        return [pooling for pooling in self.activations.poolings if pooling not in self.left_out]

    @cached_property
    def left_out(self) -> dict[str, str]:
        reasons = {}
        for pooling in self.activations.poolings:
            found = np.unique(self._places(pooling)[0])
            labels, least = self.table.labels[found], self.settings["min_per_class"]
            right, wrong = int(labels.sum()), int((1 - labels).sum())
            if min(right, wrong) < least or not _both_in_every_fold(labels, self.folds[found], self.settings["folds"]):
                reasons[pooling] = (
                    f"{right} correct and {wrong} incorrect traces have such a row, {least} of each and both in every fold are needed"
                )
        return reasons

    def trace_rows(self) -> Rows:
        """One row per trace."""
        return self._rows(np.arange(len(self.table)))

    def cell_rows(self, pooling: str) -> tuple[Rows, Ints, Ints]:
        """A pooling's rows of selected traces: what they belong to, their places in the stored tensor, their positions."""
        trace, places, positions = self._places(pooling)
        return self._rows(trace), places, positions

    def fit_control(self, name: str, part: Path) -> Json:
        fit = baselines.fit_baseline(name, self.table, self.trace_rows())
        return _save(part, {"fits": {"logistic": fit}}, {})

    def fit_cell(self, layer: int, pooling: str, part: Path) -> Json:
        """Every kind of probe, the permutation null and random directions on one layer x pooling."""
        rows, places, _ = self.cell_rows(pooling)
        fit = cross_fit(
            self.read(layer, pooling, places),
            rows,
            self.settings["c"],
            self.settings["kinds"],
            permutations_PN=self.permutations(rows, self.settings["permutations"]) if self.settings["permutations"] else None,
            random_directions=self.settings["random_directions"],
            seed=self.seed,
        )
        arrays = {"null_auroc": fit.null_auroc, "null_pairs": fit.null_pairs, "random_auroc": fit.random_auroc}
        facts = {
            "ridge_auroc": fit.ridge_auroc,
            "ridge_pairs": fit.ridge_pairs,
            "training_set_sha256": self._training_set(rows, places, layer, pooling),
        }
        return _save(part, {"fits": fit.fits, **arrays}, facts)

    def read(self, layer: int, pooling: str, places: Ints) -> torch.Tensor:
        """A cell's activations, float64 on the device to compute on.

        Raises:
            DataError: some are not finite.
        """
        acts = to_device(self.activations.read(layer, pooling, chosen=torch.as_tensor(places)))
        if not bool(torch.isfinite(acts).all()):
            bad = int((~torch.isfinite(acts).all(1)).sum())
            raise DataError(
                f"{self.activations.folder}: layer {layer}, {pooling}: {bad} rows hold numbers that are not finite; "
                "float16 overflows on large activations: set extract_activations.store_dtype=bfloat16"
            )
        return acts

    def permutations(self, rows: Rows, n: int) -> Ints:
        """For every permutation and row, a row whose label it takes: that of another trace of the same problem."""
        present, first = np.unique(rows.trace, return_index=True)
        inside = stats.permute_within(self.problem_numbers[present], n, self.seed)
        return first[inside][:, np.searchsorted(present, rows.trace)]

    def _places(self, pooling: str) -> tuple[Ints, Ints, Ints]:
        """Trace, place in the tensor and position of every row that is used, by trace."""
        number = {key: i for i, key in enumerate(self.table.keys)}
        by_trace: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(self.activations.rows(pooling)):
            trace = number.get((row.problem_id, row.sample))
            if trace is not None:
                by_trace.setdefault(trace, []).append((place, row.position))
        kept = [(trace, *pair) for trace in sorted(by_trace) for pair in evenly_spaced(by_trace[trace], self.settings["rows_per_trace"])]
        table = np.array(kept, dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def _rows(self, trace: Ints) -> Rows:
        return Rows.of(trace, self.table.labels, self.folds, self.problem_numbers)

    def _training_set(self, rows: Rows, places: Ints, layer: int, pooling: str) -> str:
        """Hash of what the final fit saw: traces, labels, positions, and the shards they were read from."""
        return sha256_json(
            {
                "traces": [[*self.table.keys[trace], int(label)] for trace, label in zip(rows.trace, rows.labels)],
                "rows": places.tolist(),
                "tensor": [layer, pooling],
                "shards": [shard.sha256 for shard in self.activations.meta.shards],
            }
        )


def _both_in_every_fold(labels: Ints, folds: Ints, n_folds: int) -> bool:
    return all(len(np.unique(labels[folds == fold])) == 2 for fold in range(n_folds))


def evenly_spaced(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of a trace's rows, evenly spaced, the last one among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[(i + 1) * len(rows) // most - 1] for i in range(most)]


def _save(part: Path, content: Json, facts: Json) -> Json:
    """Write a unit's arrays to its part and return its record."""
    arrays: dict[str, Floats] = {name: value for name, value in content.items() if name != "fits"}
    kinds: Json = {}
    for kind, fit in content["fits"].items():
        arrays |= {f"{kind}.{name}": getattr(fit, name) for name in OF_A_FIT}
        kinds[kind] = {name: getattr(fit, name) for name in ("c_of_fold", "c", "bias", "newton_steps", "last_move")}
    write_atomic(part, save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
    known = {name: value for name, value in facts.items() if not isinstance(value, float) or np.isfinite(value)}
    return {"file": part.name, "sha256": sha256_file(part), "kinds": kinds, **known}


def _load(record: Json, parts: Path) -> CellFit:
    """What ``_save`` wrote."""
    path = parts / record["file"]
    if not path.is_file() or sha256_file(path) != record["sha256"]:
        raise CorruptError(f"{path}: missing or damaged; remove the folder {parts.parent} and run train_probes again")
    arrays = load_file(path)
    fits = {}
    for kind, facts in record["kinds"].items():
        ours: Json = {name: arrays[f"{kind}.{name}"] for name in OF_A_FIT if f"{kind}.{name}" in arrays}
        fits[kind] = CrossFit(**ours, **facts)
    nothing = np.empty(0)
    return CellFit(
        fits,
        null_auroc=arrays.get("null_auroc", nothing),
        null_pairs=arrays.get("null_pairs", nothing),
        random_auroc=arrays.get("random_auroc", nothing),
        ridge_auroc=record.get("ridge_auroc", float("nan")),
        ridge_pairs=record.get("ridge_pairs", float("nan")),
    )


def evaluate(training: ProbeTraining, records: Mapping[str, Json], parts: Path) -> Evaluation:
    """Read every unit back and put the evaluation together."""
    acts, settings = training.activations, training.settings
    cells = []
    for pooling in training.poolings:
        rows, _, positions = training.cell_rows(pooling)
        for layer in acts.layers:
            if (record := records.get(f"layer_{layer}/{pooling}")) is not None:  # else it was set aside
                cells.append(Cell(layer, pooling, rows, positions, _load(record, parts)))
    return Evaluation(
        labels_T=training.table.labels,
        problems_T=training.table.problems,
        strata_T=training.table.strata,
        folds_T=training.folds,
        controls={name: _load(records[f"control/{name}"], parts).fits["logistic"].logits for name in training.controls},
        cells=cells,
        kinds=settings["kinds"],
        resamples=settings["bootstrap"],
        seed=training.seed,
    )


def publish(
    training: ProbeTraining,
    out: Path,
    *,
    records: Mapping[str, Json],
    parts: Path,
    experiment: str,
    dataset: Json,
    dtype: str,
    planted: bool,
) -> None:
    """Write report, directions (of all rows, and of each fold), held-out scores and figure into ``out``."""
    evaluation = evaluate(training, records, parts)
    table, settings = training.table, training.settings
    missing = [name for name in baselines.BASELINES if name not in training.controls]
    missing += ["layer_0"] if 0 not in training.activations.layers else []
    missing_poolings = [f"{pooling}: {reason}" for pooling, reason in training.left_out.items()]
    title = f"{experiment}: is the answer going to be correct?" + ("  (planted signal: a positive control)" if planted else "")
    figures.probe_results(evaluation, out / figures.FIGURE, title=title)
    folds = {
        "count": settings["folds"],
        "by": "problem (StratifiedGroupKFold)",
        "seed": training.seed,
        "sha256": sha256_json(sorted({problem: int(fold) for problem, fold in zip(table.problems, training.folds)}.items())),
    }
    facts = {
        "counts": table.counts,
        "n_traces": len(table),
        "n_problems": len(set(table.problems)),
        "share_correct": float(table.labels.mean()),
        "folds": folds,
        "bootstrap": settings["bootstrap"],
        "logistic_converged": f"the last Newton step moved no training logit by more than {LOGIT_TOLERANCE:g}",
        "planted": planted,
        "note": "where features say nothing about a held-out problem, cross-fitting puts the AUROC a little below 1/2, not at it",
        "controls": baselines.DESCRIPTIONS,
    }
    directions = _directions(training, evaluation, records)
    file = {
        "schema_version": direction.SCHEMA_VERSION,
        "model": training.activations.meta.model,
        "dataset": {**dataset, **table.dataset},
        "label": "P(correct)",
        "directions": directions,
        "best": {"layer": evaluation.best.layer, "pooling": evaluation.best.pooling, "kind": evaluation.leading},
        "experiment": experiment,
        "template_sha256": table.template_sha256,
        "dtype": dtype,
        "counts": table.counts,
        "poolings": {pooling: POOLING_TEXT.get(pooling, pooling) for pooling in training.poolings},
        "folds": folds,
        "planted": planted,
        "tribunal_version": tribunal.__version__,
    }
    write_atomic(out / FILE_NAME, canonical_json(file) + "\n")
    held_out.write_held_out(
        out,
        evaluation,
        table.keys,
        model=training.activations.meta.model,
        experiment=experiment,
        template_sha256=table.template_sha256,
        dtype=dtype,
        planted=planted,
    )
    report = evaluation.report(
        job="train_probes",
        experiment=experiment,
        planted=planted,
        missing=missing,
        unread=missing_poolings,
        figures=[figures.FIGURE],
        details=facts,
    )
    write_report(out, report)


def _directions(training: ProbeTraining, evaluation: Evaluation, records: Mapping[str, Json]) -> list[Json]:
    """One entry per layer, pooling and kind: the fit on all rows, with the out-of-fold numbers of its like."""
    entries = []
    for cell in evaluation.cells:
        for kind in evaluation.kinds:
            fit, scores = cell.fit.fits[kind], evaluation.scores(cell, kind)
            row = evaluation.row(cell.name(kind, evaluation.leading), "auroc", scores, cell, kind=kind)
            vector = [short(value) for value in fit.vector]
            if not any(vector):
                continue  # nothing in these activations tells the classes apart (prompt_end of a single problem)
            metrics = plain(evaluation.all_metrics(scores))
            entries.append(
                {
                    "layer": cell.layer,
                    "pooling": cell.pooling,
                    "kind": kind,
                    "hook_point": direction.hook_point(cell.layer),
                    "vector": vector,
                    "bias": short(fit.bias),
                    "norm": short(direction.vector_norm(vector)),
                    "threshold": 0.5,
                    "c": fit.c,
                    "metrics": {
                        **metrics,
                        "n": len(scores.trace),
                        "n_traces": len(np.unique(scores.trace)),
                        "gain": row.gain.model_dump() if row and row.gain else None,
                    },
                    "training_set_sha256": records[f"layer_{cell.layer}/{cell.pooling}"]["training_set_sha256"],
                }
            )
    return entries
