"""Ask an oracle: greedy answers from the one sampling engine, vectors injected into each prompt, and log-odds of two choices.

Whether the oracle, another adapter or the bare model answers depends on what is on the model (``tribunal.models.adapters``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from tribunal.core.errors import ModelError
from tribunal.models.generation import Request, Sampler
from tribunal.models.loading import LoadedModel
from tribunal.models.oracle_batches import Injection, Lesson, answer_loss, collate, injected, kept_logits
from tribunal.models.residual import input_device
from tribunal.oracle.examples import Example
from tribunal.oracle.prompts import OraclePrompts


class Asked(NamedTuple):
    """A question with the vectors that go into its prompt; None puts nothing in: the same prompt, no hook."""

    example: Example
    vectors_KD: Tensor | None


class Batch:
    """Questions in token ids; satisfies ``tribunal.models.oracle_batches.Lessons``."""

    def __init__(self, asked: Sequence[Asked], prompts: OraclePrompts) -> None:
        self.lessons = [prompts.encode(question.example, inject=question.vectors_KD is not None) for question in asked]
        self._vectors = [question.vectors_KD for question in asked]

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, number: int) -> Lesson:
        return self.lessons[number]

    def vectors(self, number: int) -> Tensor:
        vectors = self._vectors[number]
        assert vectors is not None and len(vectors) == len(self.lessons[number].positions), "one vector for each placeholder"
        return vectors


class Answerer:
    """Answers questions with whatever adapter is on the model.

    Args:
        slots: questions that run together; decides batch shapes.
        max_new_tokens: longest answer.
        batch_tokens: most tokens in a forward pass that scores answers.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: OraclePrompts,
        injection: Injection,
        *,
        slots: int,
        max_new_tokens: int,
        batch_tokens: int = 8192,
    ) -> None:
        if not 0 <= injection.layer < loaded.n_layers:
            raise ModelError(
                f"injection.layer: no layer {injection.layer}; {loaded.name} has {loaded.n_layers}, 0 to {loaded.n_layers - 1}"
            )
        self.loaded, self.prompts, self.injection = loaded, prompts, injection
        self.slots, self.max_new_tokens, self.batch_tokens = slots, max_new_tokens, batch_tokens
        self.eos_ids = sorted({prompts.eos_id, *loaded.eos_ids})

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """The greedy answer to each question, in order; one wave, so the same questions give the same answers."""
        batch = Batch(asked, self.prompts)
        requests = [Request(str(number), lesson.prompt_ids, self.max_new_tokens, 0) for number, lesson in enumerate(batch.lessons)]

        def around_prefill(keys: Sequence[str]) -> AbstractContextManager[None]:
            return injected(self.loaded.model, _placed(batch, [int(key) for key in keys]), self.injection)

        sampler = Sampler(
            self.loaded.model, eos_ids=self.eos_ids, slots=self.slots, temperature=0, slots_field="slots", around_prefill=around_prefill
        )
        texts = [""] * len(asked)
        for done in sampler.run(requests):
            for finished in done:
                texts[int(finished.key)] = self.prompts.decode(finished.tokens)
        return texts

    @torch.no_grad()
    def losses(self, asked: Sequence[Asked]) -> list[tuple[float, int]]:
        """Cross-entropy (nats, summed) of each target and its number of tokens, end of turn included."""
        batch = Batch(asked, self.prompts)
        found = [(0.0, len(lesson.answer_ids)) for lesson in batch.lessons]
        for numbers in self._batches(batch):
            collated = self._collate(batch, numbers)
            with injected(self.loaded.model, collated, self.injection):
                losses_N = answer_loss(self.loaded.model, collated, reduction="none").cpu()
            for row, loss in zip(collated["label_rows"].tolist(), losses_N.tolist()):
                total, tokens = found[numbers[row]]
                found[numbers[row]] = total + loss, tokens
        return found

    @torch.no_grad()
    def log_odds(self, asked: Sequence[Asked], choices: tuple[str, str]) -> list[float]:
        """log P(second choice) - log P(first choice), of their first tokens right after the prompt, "Yes" and "YES" counted with "yes".

        Raises:
            ModelError: both choices begin with the same token, so nothing tells them apart there.
        """
        first, second = (self.prompts.beginnings(choice) for choice in choices)
        if first[0] in second or second[0] in first:
            raise ModelError(f"{self.loaded.name}: the answers {choices[0]!r} and {choices[1]!r} begin with the same token")
        first, second = [i for i in first if i not in second], [i for i in second if i not in first]
        batch = Batch(asked, self.prompts)
        found = [0.0] * len(asked)
        for numbers in self._batches(batch):
            collated = self._collate(batch, numbers)
            with injected(self.loaded.model, collated, self.injection):
                logits_BCV = kept_logits(self.loaded.model, collated)
            place = {column: i for i, column in enumerate(collated["keep"].tolist())}
            ends = [place[len(batch[number].prompt_ids) - 1] for number in numbers]
            logits_BV = logits_BCV[list(range(len(numbers))), ends].float()
            odds_B = logits_BV[:, second].logsumexp(-1) - logits_BV[:, first].logsumexp(-1)
            for number, odds in zip(numbers, odds_B.tolist()):
                found[number] = odds
        return found

    def _collate(self, batch: Batch, numbers: Sequence[int]) -> dict[str, Tensor]:
        device = input_device(self.loaded.model)
        return {name: tensor.to(device) for name, tensor in collate(batch, numbers, pad_id=0).items()}

    def _batches(self, batch: Batch) -> Iterator[list[int]]:
        """Longest first, within the token budget."""
        waiting = sorted(range(len(batch)), key=lambda number: (-batch[number].length, number))
        while waiting:
            size = max(1, self.batch_tokens // batch[waiting[0]].length)
            yield waiting[:size]
            del waiting[:size]


def _placed(batch: Batch, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Where the vectors of these questions go: row n of the pass is the n-th question."""
    rows = [row for row, number in enumerate(numbers) for _ in batch[number].positions]
    positions = [position for number in numbers for position in batch[number].positions]
    vectors = [batch.vectors(number) for number in numbers if batch[number].positions]
    return {
        "vectors": torch.cat(vectors) if vectors else torch.empty(0, 1),
        "rows": torch.tensor(rows, dtype=torch.long),
        "positions": torch.tensor(positions, dtype=torch.long),
    }
