"""The linear probe beside an oracle: the same activations, the same split, the same question, no words.

N items, K vectors of an item, D model width, C classes (one column where there are two), P penalties,
O options (penalties, and again with a probe for each question)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tribunal.oracle.examples import Example
from tribunal.oracle.vectors import Vectors
from tribunal.probes.linear import TrainingSet, to_device

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties that are tried."""
ENOUGH = 10
"""A probe of its own needs so many training examples of each of two answers."""
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
    by_question: bool = False,
) -> list[ProbeAnswer]:
    """Fit on ``train``, choose on ``validation``, answer ``items``.

    Two classes: logistic regression. More: ridge, one class against the rest, the largest score wins.

    One direction cannot serve several layers, so there is a probe for each set of layers that examples read; one with too few
    training examples (``ENOUGH``) is answered by a probe on all of them. With ``by_question`` each question that has enough of
    them at these layers gets a probe of its own, the others keep that of the layers. Whether it does, and the penalty, is
    decided once for all sets of layers, so that their log-odds are of one scale: two classes by the log-loss (nats) of all
    validation examples, which sees what a probe that nearly always says the same still tells apart; more by how many are right.
    On a tie one probe for all questions, then the smallest inverse penalty.

    Args:
        odds: the two classes, the second one positive; None where there are more.
        by_question: questions ask about different things, so that one direction cannot serve them all.
    """
    asked = [*validation, *items]
    wide = len({e.n_vectors for e in (*train, *asked)}) == 1 and train[0].n_vectors * vectors.of(train[0]).shape[1] <= WIDEST
    classes = list(odds) if odds else sorted({example.target for example in train})

    def scores(mine: Sequence[Example], numbers: Sequence[int]) -> Tensor:
        """[P, N, C] of the examples asked about with these numbers, fitted on ``mine`` with each of the P penalties."""
        training = TrainingSet(_features(mine, vectors, wide))
        acts_ND = _features([asked[number] for number in numbers], vectors, wide)
        target_N = torch.tensor([classes.index(example.target) for example in mine], device=acts_ND.device)
        if odds:
            return training.logistic(target_N, PENALTIES).scores(acts_ND).T[..., None]
        labels_NC = torch.nn.functional.one_hot(target_N, len(classes))
        return torch.stack([training.ridge(labels_NC, c).scores(acts_ND) for c in PENALTIES])

    parts, order = [], []
    for layers, numbers in _places([tuple(example.layers) for example in asked]).items():
        mine = [example for example in train if tuple(example.layers) == layers]
        found = scores(mine if _enough(mine) else train, numbers)
        if by_question:
            apart = found.clone()
            for question, rows in _places([asked[number].question for number in numbers]).items():
                own = [example for example in mine if example.question == question]
                if _enough(own):
                    apart[:, rows] = scores(own, [numbers[row] for row in rows])
            found = torch.cat([found, apart])
        parts.append(found)
        order += numbers
    scores_ONC = torch.cat(parts, 1)[:, torch.tensor(order).argsort()]
    losses = _losses(scores_ONC[:, : len(validation)], [example.target for example in validation], classes)
    best_NC = scores_ONC[losses.index(min(losses)), len(validation) :]
    return [ProbeAnswer(classes[said], float(row[0]) if odds else None) for said, row in zip(_chosen(best_NC).tolist(), best_NC)]


def _losses(scores_ONC: Tensor, targets: Sequence[str], classes: Sequence[str]) -> list[float]:
    """Of each option, summed over examples: log-loss in nats where there are two classes, else how many are wrong."""
    target_N = torch.tensor([classes.index(target) if target in classes else -1 for target in targets], device=scores_ONC.device)
    if scores_ONC.shape[2] == 1:
        odds_ON = scores_ONC[..., 0]
        return (torch.nn.functional.softplus(odds_ON) - target_N * odds_ON).sum(1).tolist()
    return (_chosen(scores_ONC) != target_N).sum(1).tolist()


def _enough(examples: Sequence[Example]) -> bool:
    return sum(count >= ENOUGH for count in Counter(example.target for example in examples).values()) >= 2


def _places(names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Where each name stands, in the order of their first places."""
    found: dict[Hashable, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name, []).append(number)
    return found


def _chosen(scores: Tensor) -> Tensor:
    """The class of each row of [..., C]: the sign of one column, the largest of several."""
    return (scores[..., 0] >= 0).long() if scores.shape[-1] == 1 else scores.argmax(-1)


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
