"""Batches for training an oracle, and their loss: which example is where, and nothing computed that no answer needs.

A step is a random draw from the whole mixture. Inside it examples are sorted by length and cut into passes of at most so many
tokens, so padding is small and memory bounded; which example is where is a function of the seed, the lengths and the number
of processes alone. The language-model head runs at the columns that predict an answer, nowhere else.

Shapes: B rows, L tokens, K vectors, D model width, N answer tokens, C columns with a label in some row, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from tribunal.core.errors import ConfigError
from tribunal.core.work import Json
from tribunal.models.residual import columns_to_keep, inject


class Injection(NamedTuple):
    """How vectors are put in; see ``tribunal.models.residual.inject``."""

    layer: int = 1
    scale: float = 1.0
    mode: Literal["add", "replace"] = "add"
    norm_matched: bool = True


class Lesson(NamedTuple):
    """One example, ready to be trained on. Without ``positions`` nothing is injected into its prompt."""

    prompt_ids: list[int]
    positions: list[int]  # of the vectors in the prompt, in their order
    answer_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class Lessons(Protocol):
    """Numbered examples with their vectors."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Lesson: ...

    def vectors(self, number: int) -> Tensor:
        """[K, D], one for each position of the lesson."""


class Passes(NamedTuple):
    """What one process does in one step: the examples of each forward pass, and the answer tokens of the whole step."""

    passes: list[list[int]]
    labels: int


class StepPlan:
    """Which examples each optimizer step sees, and in which forward passes: a pure function of the arguments.

    Every example is seen once before any is seen again, in an order that is drawn anew each time.

    Args:
        lengths: tokens of each example, prompt and answer.
        answers: tokens of each example's answer.
        batch_size: examples in an optimizer step, over all processes.
        batch_tokens: most tokens in one forward pass of one process, padding included (a single example always fits).
        world: number of processes.
    """

    def __init__(
        self, lengths: Sequence[int], answers: Sequence[int], *, batch_size: int, batch_tokens: int, seed: int, world: int = 1
    ) -> None:
        if batch_size % world:
            raise ConfigError(f"batch_size: {batch_size} examples in a step cannot be shared equally by {world} processes")
        assert len(lengths), "nothing to train on"
        self.lengths, self.answers = np.asarray(lengths), np.asarray(answers)
        self.batch_size, self.batch_tokens, self.seed, self.world = batch_size, batch_tokens, seed, world
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def step(self, step: int) -> list[Passes]:
        """What each process does in a step (0-based)."""
        numbers = self._examples(step)
        numbers = numbers[np.argsort(-self.lengths[numbers], kind="stable")]  # longest first: memory runs out at once or never
        shares = [numbers[rank :: self.world] for rank in range(self.world)]
        count = next(k for k in range(1, len(shares[0]) + 1) if all(self._fits(share, k) for share in shares))
        labels = int(self.answers[numbers].sum())
        return [Passes([part.tolist() for part in np.array_split(share, count)], labels) for share in shares]

    def _fits(self, share: np.ndarray, count: int) -> bool:
        parts = np.array_split(share, count)
        return all(len(part) == 1 or len(part) * int(self.lengths[part].max()) <= self.batch_tokens for part in parts)

    def _examples(self, step: int) -> np.ndarray:
        n = len(self.lengths)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self._order(int(place // n))[place % n] for place in places])

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))


class StepBatches(torch.utils.data.Dataset[Json]):
    """Map-style dataset whose item ``step * world + rank`` is everything one process does in one step, made when asked for."""

    def __init__(self, lessons: Lessons, plan: StepPlan, steps: int, pad_id: int) -> None:
        self.lessons, self.plan, self.steps, self.pad_id = lessons, plan, steps, pad_id

    def __len__(self) -> int:
        return self.steps * self.plan.world

    def __getitem__(self, item: int) -> Json:
        step, rank = divmod(item, self.plan.world)
        passes, labels = self.plan.step(step)[rank]
        return {"passes": [collate(self.lessons, numbers, self.pad_id) for numbers in passes], "n_labels": labels}


def collate(lessons: Lessons, numbers: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """One forward pass, padded on the right (a causal model's tokens never see what follows them, so there is no mask).

    Returns:
        ``input_ids`` [B, L]; ``vectors`` [K, D] with their ``rows`` and ``positions`` [K]; ``keep`` [C], the columns whose
        output is needed; ``label_rows``, ``label_columns`` (into ``keep``) and ``targets`` [N].
    """
    given = [lessons[number] for number in numbers]
    length = max(lesson.length for lesson in given) - 1  # the last answer token predicts nothing
    input_ids = torch.full((len(given), length), pad_id)
    rows: list[int] = []
    positions: list[int] = []
    label_rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, lesson in enumerate(given):
        ids = [*lesson.prompt_ids, *lesson.answer_ids][:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        rows += [row] * len(lesson.positions)
        positions += lesson.positions
        label_rows += [row] * len(lesson.answer_ids)
        columns += range(len(lesson.prompt_ids) - 1, len(ids))
        targets += lesson.answer_ids
    vectors = [lessons.vectors(number) for number, lesson in zip(numbers, given) if lesson.positions]
    keep, label_columns = torch.tensor(columns).unique(return_inverse=True)
    return {
        "input_ids": input_ids,
        "vectors": torch.cat(vectors) if vectors else torch.empty(0, 1),
        "rows": torch.tensor(rows, dtype=torch.long),
        "positions": torch.tensor(positions, dtype=torch.long),
        "keep": keep,
        "label_rows": torch.tensor(label_rows),
        "label_columns": label_columns,
        "targets": torch.tensor(targets),
    }


def answer_loss(model: Any, batch: dict[str, Tensor], *, reduction: Literal["sum", "none"] = "sum") -> Tensor:
    """Cross-entropy (nats) of the answer tokens, the first one included: their sum, or each; call it inside ``injected``."""
    logits_BCV = kept_logits(model, batch)
    device = logits_BCV.device  # of the head, where a model is split over several
    picked_NV = logits_BCV[batch["label_rows"].to(device), batch["label_columns"].to(device)].float()
    return torch.nn.functional.cross_entropy(picked_NV, batch["targets"].to(device), reduction=reduction)


def kept_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The output at the columns ``keep`` of a batch, [B, C, V]; call it inside ``injected``."""
    keep = columns_to_keep(model, batch["keep"])
    return cast(Tensor, model(input_ids=batch["input_ids"], logits_to_keep=keep, use_cache=False).logits)


def injected(model: Any, batch: dict[str, Tensor], injection: Injection) -> Any:
    """The context in which a batch's vectors are in place."""
    if not len(batch["rows"]):
        return nullcontext()
    return inject(model, batch["vectors"], batch["rows"], batch["positions"], **injection._asdict())
