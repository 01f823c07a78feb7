"""The key-value cache of the sampling engine: rows come and go, all rows end at the same column.

Preallocated per layer as [slots, heads, columns, head_dim]. Live rows are the first ``rows``; row r holds its
sequence in columns [starts[r], end), right-aligned, so that one slice write per layer appends a token to all
rows and attention reads one view, without a copy per step. A row leaves by moving the last row into its place;
columns that no live row uses any more are dropped from the view at once and from the buffer when it is next
laid out. Shapes that attention sees depend on the rows' lengths only, never on the buffer's capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

_STEP = 128  # columns are allocated in multiples of this
_GROWTH = 1.25


class SlotLayer(CacheLayerMixin):
    """One layer's buffers, seen by the model as an ordinary cache layer of full attention."""

    is_sliding = False  # kept whole: where a model has a sliding window, its attention mask carries it

    def __init__(self, cache: SlotCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.cache = cache
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a slot layer is allocated when its first rows join")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token per row at column ``end``; return what its attention may see, [rows, heads, width + 1, head_dim]."""
        cache = self.cache
        assert key_states.shape[0] == cache.rows and key_states.shape[2] == 1
        rows, end = slice(cache.rows), cache.end
        self.keys[rows, :, end] = key_states[:, :, 0]
        self.values[rows, :, end] = value_states[:, :, 0]
        return self.keys[rows, :, cache.start : end + 1], self.values[rows, :, cache.start : end + 1]

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The engine's cache over all layers.

    Attributes:
        layers: filled when the first rows join.
        starts: first column of each live row.
        end: the column that the next token of every row is written to.
        capacity: allocated columns.
    """

    def __init__(self, slots: int) -> None:
        self.layers: list[SlotLayer]  # type: ignore[assignment]  # the base class allows other kinds
        super().__init__(layers=[])
        self.slots = slots
        self.starts: list[int] = []
        self.end = 0
        self.capacity = 0

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def start(self) -> int:
        return min(self.starts, default=self.end)

    @property
    def width(self) -> int:
        return self.end - self.start

    @property
    def bytes_used(self) -> int:
        """Bytes of keys and values that a saved state would hold."""
        buffers = [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]
        return sum(self.rows * self.width * b.shape[1] * b.shape[3] * b.element_size() for b in buffers)

    def join(self, prefilled: DynamicCache, source: Sequence[int], lengths: Sequence[int]) -> None:
        """Append rows whose prompts were run in a batch of their own.

        Args:
            prefilled: right-padded keys and values of that batch.
            source: for each new row its row in ``prefilled`` (samples of one prompt share it).
            lengths: for each new row its number of prompt tokens.
        """
        assert self.rows + len(source) <= self.slots
        if not self.layers:
            self._allocate(prefilled)
        self._reserve(max(lengths))
        first = self.rows
        for layer, given in zip(self.layers, _keys_values(prefilled), strict=True):
            for i, (row, length) in enumerate(zip(source, lengths, strict=True)):
                columns = slice(self.end - length, self.end)
                layer.keys[first + i, :, columns] = given[0][row, :, :length]
                layer.values[first + i, :, columns] = given[1][row, :, :length]
        self.starts += [self.end - length for length in lengths]

    def leave(self, row: int) -> None:
        """Remove a row: the last one takes its place."""
        last = self.rows - 1
        if row != last:
            columns = slice(self.starts[last], self.end)
            for layer in self.layers:
                layer.keys[row, :, columns] = layer.keys[last, :, columns]
                layer.values[row, :, columns] = layer.values[last, :, columns]
            self.starts[row] = self.starts[last]
        self.starts.pop()

    def begin_step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make room for one more column.

        Returns:
            position ids [rows, 1] of the tokens about to be fed, and the mask [rows, width + 1] over the columns (True: may
            be seen), None where no row is padded.
        """
        self._reserve(0)
        positions = torch.tensor([[self.end - start] for start in self.starts], device=device)
        if len(set(self.starts)) == 1:
            return positions, None
        pads = torch.tensor([[start - self.start] for start in self.starts], device=device)
        return positions, torch.arange(self.width + 1, device=device)[None, :] >= pads

    def end_step(self) -> None:
        self.end += 1

    def layout(self) -> dict[str, Any]:
        """What ``load`` needs to lay the buffers out as they were (strides included), as JSON."""
        devices = [str(layer.keys.device) for layer in self.layers]
        return {"starts": self.starts, "end": self.end, "capacity": self.capacity, "slots": self.slots, "devices": devices}

    def save(self, path: Path) -> None:
        rows, columns = slice(self.rows), slice(self.start, self.end)
        tensors = {}
        for i, layer in enumerate(self.layers):
            # to the host layer by layer: a GPU full of keys and values has no room for a second copy
            tensors[f"keys.{i}"] = layer.keys[rows, :, columns].cpu().contiguous()
            tensors[f"values.{i}"] = layer.values[rows, :, columns].cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, layout: dict[str, Any], devices: Sequence[torch.device]) -> SlotCache:
        """Args: devices: for each layer the device that its buffers belong on."""
        cache = cls(layout["slots"])
        cache.starts, cache.end, cache.capacity = list(layout["starts"]), layout["end"], layout["capacity"]
        with safe_open(path, framework="pt") as file:
            for i, device in enumerate(devices):
                keys, values = (cache._restored(file.get_tensor(f"{name}.{i}"), device) for name in ("keys", "values"))
                cache.layers.append(SlotLayer(cache, keys, values))
        return cache

    def _restored(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        _, heads, _, head_dim = part.shape
        buffer = torch.zeros(self.slots, heads, self.capacity, head_dim, dtype=part.dtype, device=device)
        buffer[: self.rows, :, self.start : self.end] = part.to(device)
        return buffer

    def _allocate(self, like: DynamicCache) -> None:
        for pair in _keys_values(like):
            keys, values = (t.new_zeros(self.slots, t.shape[1], 0, t.shape[3]) for t in pair)
            self.layers.append(SlotLayer(self, keys, values))

    def _reserve(self, length: int) -> None:
        """Make sure that ``length`` columns lie before ``end`` and one behind it."""
        if length <= self.end < self.capacity:
            return
        width = self.width
        end = max(width, length)
        capacity = -(-max(end + 1, int(end * _GROWTH)) // _STEP) * _STEP
        kept, target = slice(self.start, self.end), slice(end - width, end)
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                # zeros, not empty: a masked column has weight 0, and 0 * NaN would be NaN
                new = old.new_zeros(self.slots, old.shape[1], capacity, old.shape[3])
                new[: self.rows, :, target] = old[: self.rows, :, kept]
                setattr(layer, name, new)
                del old  # one layer's worth of both at a time
        self.starts = [start + end - self.end for start in self.starts]
        self.end, self.capacity = end, capacity


def _keys_values(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's tensors, [rows, heads, tokens, head_dim]."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
