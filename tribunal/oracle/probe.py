"""The linear probe beside an oracle: the same activations, the same split, the same question, no words.

N items, K vectors of an item, D model width, C classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tribunal.oracle.examples import Example
from tribunal.oracle.vectors import Vectors
from tribunal.probes.linear import TrainingSet, to_device

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties; the one that is right most often on the validation examples is used, the smallest on a tie."""
WIDEST = 16_384
"""Vectors are put side by side up to this many features; beyond it, and where items differ in their number, mean and last are taken."""


class ProbeAnswer(NamedTuple):
    """An answer in words and, where there are two possible ones, the log-odds of the second."""

    text: str
    odds: float | None


def answer_by_probe(
    train: Sequence[Example],
    validation: Sequence[Example],
    items: Sequence[Example],
    vectors: Vectors,
    *,
    odds: tuple[str, str] | None,
) -> list[ProbeAnswer]:
    """Fit on ``train``, choose the penalty on ``validation``, answer ``items``.

    Two classes: logistic regression. More: ridge, one class against the rest, the largest score wins.
    """
    every = [*train, *validation, *items]
    wide = len({example.n_vectors for example in every}) == 1 and every[0].n_vectors * vectors.of(every[0]).shape[1] <= WIDEST
    fit_ND, check_ND, ask_ND = (_features(part, vectors, wide) for part in (train, validation, items))
    classes = list(odds) if odds else sorted({example.target for example in train})
    target_N = torch.tensor([classes.index(example.target) for example in train], device=fit_ND.device)
    training = TrainingSet(fit_ND)
    if odds:
        fitted = training.logistic(target_N, PENALTIES)
        checked, asked = ([scores[:, [i]] for i in range(len(PENALTIES))] for scores in (fitted.scores(check_ND), fitted.scores(ask_ND)))
    else:
        labels_NC = torch.nn.functional.one_hot(target_N, len(classes))
        fits = [training.ridge(labels_NC, c) for c in PENALTIES]
        checked, asked = ([fit.scores(part) for fit in fits] for part in (check_ND, ask_ND))
    right = [sum(classes[i] == e.target for i, e in zip(_chosen(scores), validation)) for scores in checked]
    best = asked[right.index(max(right))]
    values = best[:, 0].tolist() if odds else [None] * len(items)
    return [ProbeAnswer(classes[i], value) for i, value in zip(_chosen(best), values)]


def _chosen(scores_NC: Tensor) -> list[int]:
    """The class of each row: the sign of one column, the largest of several."""
    if scores_NC.shape[1] == 1:
        return (scores_NC[:, 0] >= 0).long().tolist()
    return scores_NC.argmax(1).tolist()


def _features(examples: Sequence[Example], vectors: Vectors, wide: bool) -> Tensor:
    """[N, features], float64: all vectors side by side, or for each layer their mean and the last one."""
    rows = []
    for example in examples:
        vectors_KD = vectors.of(example)
        if wide:
            rows.append(vectors_KD.flatten())
            continue
        by_layer = vectors_KD.reshape(len(example.layers), len(example.tokens), -1)
        rows.append(torch.cat([by_layer.mean(1), by_layer[:, -1]], 1).flatten())
    return to_device(torch.stack(rows))
