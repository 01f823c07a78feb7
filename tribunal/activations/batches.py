"""Sequences run through a model together, longest first, within a budget of tokens that is halved whenever memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from tribunal.core.errors import UserError

log = logging.getLogger(__name__)
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


class Keyed(Protocol):
    """A sequence of token ids with a name."""

    @property
    def key(self) -> str: ...

    @property
    def ids(self) -> list[int]: ...


S = TypeVar("S", bound=Keyed)
Result = TypeVar("Result")


def token_budget(batch_tokens: int | None, device: torch.device) -> int:
    """Tokens in a batch; None: ``DEFAULT_BATCH_TOKENS``."""
    return batch_tokens or DEFAULT_BATCH_TOKENS["cpu" if device.type == "cpu" else "cuda"]


class Batches:
    """Puts sequences together and counts how often memory ran out.

    Args:
        batch_tokens: tokens in a batch, padding included; a longer sequence runs alone. None: ``DEFAULT_BATCH_TOKENS``.
        device: where the model takes its ids.
    """

    def __init__(self, batch_tokens: int | None, device: torch.device) -> None:
        self.device = device
        self.batch_tokens = token_budget(batch_tokens, device)
        self.halvings = 0

    def run(self, sequences: Iterable[S], forward: Callable[[Sequence[S]], Result]) -> Iterator[tuple[Sequence[S], Result]]:
        """Each batch with what ``forward`` makes of it; the budget is whole again in the next call.

        Raises:
            UserError: one sequence alone does not fit the memory.
        """
        waiting = sorted((s for s in sequences if s.ids), key=lambda s: (-len(s.ids), s.key))  # longest first: fails early
        budget = self.batch_tokens
        while waiting:
            batch = waiting[: max(1, budget // len(waiting[0].ids))]
            try:
                result = forward(batch)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                size = len(batch) * len(batch[0].ids)
                if len(batch) == 1:
                    raise UserError(
                        f"trace {batch[0].key}: {size} tokens do not fit the memory of {self.device}, even alone; take fewer layers or "
                        "poolings, a larger GPU, or model.device_map: auto"
                    ) from error
                budget = min(budget, size) // 2
                self.halvings += 1
                log.warning("out of memory with %d x %d tokens; going on with %d tokens a batch", len(batch), len(batch[0].ids), budget)
            else:
                yield batch, result
                del waiting[: len(batch)]
                continue
            gc.collect()  # outside the handler, which keeps the failed pass alive
            torch.cuda.empty_cache()


def _out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
