"""Probe scores and directions that never saw the problem they are asked about: what ``train_probes`` hands to later phases.

    held_out = read_held_out("results/gsm8k/train_probes")
    held_out.direction_of("gsm8k-17").logits(acts_ND)      # fitted without problem gsm8k-17, and without its whole fold
    held_out.logit["gsm8k-17", 3]                          # what that direction says of sample 3

Layer, pooling and kind are the headline's. They were chosen on all problems; ``nested_logit`` is free of that choice too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tribunal.core.errors import CorruptError, DataError
from tribunal.core.records import Record
from tribunal.core.storage import canonical_json, iter_jsonl, read_json, write_atomic, write_jsonl
from tribunal.probes.crossfit import CrossFit
from tribunal.probes.direction import Direction, Model, Place, hook_point, vector_norm
from tribunal.probes.evaluation import Cell, Evaluation

SCORES = "held_out.jsonl"
DIRECTIONS = "fold_directions.json"
SCHEMA_VERSION = 1
CONTRAST = "diff_of_means"


class HeldOutScore(Record):
    """One trace of the training table, scored by the probe that was fitted without its fold."""

    problem_id: str
    sample: int
    label: Literal[0, 1]
    fold: int
    logit: float | None
    """Of the headline's layer, pooling and kind; the mean over a trace's rows; None where the pooling has no row of it."""
    nested_logit: float | None
    """Of the cell chosen without the trace's fold."""


class FoldDirections(BaseModel):
    """The probes fitted without one fold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fold: int
    direction: Direction
    diff_of_means: Direction | None


class File(BaseModel):
    """``fold_directions.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1
    model: Model
    label: str
    layer: int
    pooling: str
    kind: str
    folds: list[FoldDirections]
    experiment: str
    template_sha256: str
    dtype: str
    planted: bool


@dataclass(frozen=True)
class HeldOut:
    """What can be said of each problem without having seen it.

    Attributes:
        folder: of the train_probes results.
        place: layer, pooling and kind of the directions.
        folds: fold of every problem that a probe was trained on.
        labels: 1 correct, 0 incorrect, by (problem_id, sample).
        logit: out-of-fold logit of the headline's cell; traces without a row of its pooling are missing.
        nested_logit: of the cell that was chosen without the trace's fold: layer and pooling are held out as well.
    """

    folder: Path
    file: File
    folds: dict[str, int]
    labels: dict[tuple[str, int], int]
    logit: dict[tuple[str, int], float]
    nested_logit: dict[tuple[str, int], float]

    @property
    def place(self) -> Place:
        return Place(layer=self.file.layer, pooling=self.file.pooling, kind=self.file.kind)

    @cached_property
    def _by_fold(self) -> dict[int, FoldDirections]:
        return {entry.fold: entry for entry in self.file.folds}

    def fold_of(self, problem_id: str) -> int:
        """The fold that a problem was held out in.

        Raises:
            DataError: no probe was trained on this problem, so it has no fold.
        """
        if problem_id not in self.folds:
            raise DataError(
                f"{self.folder / SCORES}: no problem '{problem_id}' among the {len(self.folds)} with a correct or incorrect trace; "
                "only those have a fold"
            )
        return self.folds[problem_id]

    def direction_of(self, problem_id: str) -> Direction:
        """The headline's probe as it was fitted without this problem's fold."""
        return self._by_fold[self.fold_of(problem_id)].direction

    def diff_of_means_of(self, problem_id: str) -> Direction:
        """Difference of means at the same layer and pooling, without this problem's fold.

        Raises:
            DataError: train_probes fitted no difference of means.
        """
        found = self._by_fold[self.fold_of(problem_id)].diff_of_means
        if found is None:
            raise DataError(f"{self.folder / DIRECTIONS}: holds no diff_of_means; add it to train_probes.kinds and run train_probes again")
        return found


def read_held_out(folder: Path | str) -> HeldOut:
    """Read what train_probes published about held-out problems.

    Raises:
        DataError: a file is missing or wrong, or a problem lies in two folds or in one without directions; one line.
    """
    folder = Path(folder)
    for name in (SCORES, DIRECTIONS):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: not there; results of an earlier version: remove {folder} and run train_probes again")
    file = _read_directions(folder / DIRECTIONS)
    known = {entry.fold for entry in file.folds}
    result = HeldOut(folder, file, {}, {}, {}, {})
    for number, line in enumerate(iter_jsonl(folder / SCORES, HeldOutScore), 1):
        key, where = (line.problem_id, line.sample), f"{folder / SCORES}, line {number}"
        if result.folds.setdefault(line.problem_id, line.fold) != line.fold or key in result.labels:
            raise DataError(f"{where}: problem '{line.problem_id}' lies in two folds, or sample {line.sample} is there twice")
        if line.fold not in known:
            raise DataError(f"{where}: fold {line.fold}, but {DIRECTIONS} holds {sorted(known)}")
        result.labels[key] = line.label
        if line.logit is not None:
            result.logit[key] = line.logit
        if line.nested_logit is not None:
            result.nested_logit[key] = line.nested_logit
    return result


def _read_directions(path: Path) -> File:
    try:
        data = read_json(path)
        file = File.model_validate(data)
    except CorruptError as error:
        raise DataError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}") from None
    for entry in file.folds:
        for name, found in (("direction", entry.direction), (CONTRAST, entry.diff_of_means)):
            if found is not None and (len(found.vector) != file.model.d_model or not np.isfinite([*found.vector, found.bias]).all()):
                raise DataError(
                    f"{path}: fold {entry.fold}, {name}: {len(found.vector)} numbers where model.d_model is {file.model.d_model}, "
                    "or one that is not finite"
                )
    return file


def write_held_out(
    out: Path,
    evaluation: Evaluation,
    keys: list[tuple[str, int]],
    *,
    model: dict[str, Any],
    experiment: str,
    template_sha256: str,
    dtype: str,
    planted: bool,
) -> None:
    """Write held_out.jsonl and fold_directions.json into ``out``.

    Args:
        keys: (problem_id, sample) of every trace, in the evaluation's order.
    Raises:
        CorruptError: the units were made by a version that kept no directions of the folds.
    """
    cell, kind = evaluation.best, evaluation.leading
    best, chosen = (dict(zip(s.trace.tolist(), s.logits.tolist())) for s in (evaluation.by_trace(cell), evaluation.nested))

    def lines() -> Iterator[HeldOutScore]:
        for i, (problem, sample) in enumerate(keys):
            label, fold = int(evaluation.labels[i]), int(evaluation.folds[i])
            scores = {"logit": best.get(i), "nested_logit": chosen.get(i)}
            yield HeldOutScore.model_validate({"problem_id": problem, "sample": sample, "label": label, "fold": fold, **scores})

    write_jsonl(out / SCORES, lines())
    folds = sorted({int(fold) for fold in evaluation.folds})
    contrast = cell.fit.fits.get(CONTRAST)
    file = File(
        model=Model.model_validate(model),
        label="P(correct)",
        layer=cell.layer,
        pooling=cell.pooling,
        kind=kind,
        folds=[
            FoldDirections(
                fold=fold,
                direction=_direction(cell, kind, cell.fit.fits[kind], fold),
                diff_of_means=None if contrast is None else _direction(cell, CONTRAST, contrast, fold),
            )
            for fold in folds
        ],
        experiment=experiment,
        template_sha256=template_sha256,
        dtype=dtype,
        planted=planted,
    )
    write_atomic(out / DIRECTIONS, canonical_json(file.model_dump(mode="json")) + "\n")


def _direction(cell: Cell, kind: str, fit: CrossFit, fold: int) -> Direction:
    """The fit without one fold, at full precision: its logits are those of held_out.jsonl."""
    if fold >= len(fit.fold_vectors):
        raise CorruptError(
            f"layer {cell.layer}, {cell.pooling}: the fits of the folds were not kept, an earlier version trained them; "
            "remove checkpoints/<experiment>/train_probes and run train_probes again"
        )
    vector = fit.fold_vectors[fold]
    return Direction(
        layer=cell.layer,
        pooling=cell.pooling,
        kind=kind,
        hook_point=hook_point(cell.layer),
        vector=vector.tolist(),
        bias=float(fit.fold_biases[fold]),
        norm=vector_norm(vector),
        c=fit.c_of_fold[fold] if fit.c_of_fold else None,
        metrics={},
        training_set_sha256=None,
    )
