"""Read the residual stream of traces in one pass: chosen layers x poolings, pooled on the device, stored in shards.

Length-bucketed batches, padded on the right and run without a mask (causal attention never looks at later padding);
nothing runs after the deepest wanted block, and nothing after the last token that a row needs.

Shapes: B sequences, L tokens, D model width, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tribunal.activations.batches import Batches
from tribunal.activations.poolings import PooledSpan, spans
from tribunal.activations.store import DTYPES, Piece, ShardWriter
from tribunal.core.errors import DataError, ModelError
from tribunal.core.records import Trace, TraceLabel
from tribunal.models.residual import Reader, blocks, decoder, hook_point, input_device, plain_forward, read_residual

Pair = tuple[Trace, TraceLabel]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Largest ||batched - plain|| / ||plain|| of a row in the self-check. What a wrong mask or position does is of order 1;
what another batch shape does to the low bits grows with depth in half precision."""
SELF_CHECK_TRACES = 3


def default_layers(n_layers: int) -> list[int]:
    """Five evenly spaced layers, first, middle and last among them (fewer in a model of fewer layers)."""
    return sorted({(n_layers - 1) * quarter // 4 for quarter in range(5)})


def wanted_layers(asked: Sequence[int] | str | None, n_layers: int) -> list[int]:
    """Layers to read: layer 0 always, since every probe is compared with it."""
    if asked == "all":
        return list(range(n_layers))
    assert not isinstance(asked, str)
    return sorted({0, *(asked or default_layers(n_layers))})


class Extracted(NamedTuple):
    """What a shard holds: rows by pooling, traces without a row by pooling, and how often memory ran out."""

    rows: dict[str, int]
    absent: dict[str, int]
    oom_halvings: int


class _Sequence(NamedTuple):
    """One trace, ready to run: the ids that its rows need and the spans by pooling."""

    key: str
    ids: list[int]
    prompt_len: int
    spans: dict[str, list[PooledSpan]]
    first_row: dict[str, int]


class Extractor:
    """Pools the residual stream of a model over traces.

    Args:
        model: a Hugging Face causal language model in eval mode, on one device or dispatched over several.
        layers: 0-based blocks; layer 0 is added.
        poolings: names of ``tribunal.activations.poolings.POOLINGS``.
        store_dtype: float32, bfloat16 or float16; pooling itself is in float32.
        batch_tokens: tokens in a batch, padding included; None takes 512 on a CPU and 16384 on a GPU. A longer
            sequence runs alone. Batch shapes change the low bits of a result.
        reader: another way to run the model, see ``tribunal.models.bridge``; by default forward hooks.
    Raises:
        ModelError: a layer is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | str | None = None,
        poolings: Sequence[str],
        store_dtype: str = "bfloat16",
        batch_tokens: int | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.model = model
        self.layers = wanted_layers(layers, len(blocks(model)))
        check_layers(self.layers, len(blocks(model)), "layers")
        self.poolings = list(dict.fromkeys(poolings))
        self.store_dtype = store_dtype
        self.device = input_device(model)
        self.batches = Batches(batch_tokens, self.device)
        self.batch_tokens = self.batches.batch_tokens
        self._read: Reader = reader or (lambda ids_BL, readers: read_residual(model, ids_BL, readers))
        if self.device.type == "cpu":
            _keep_freed_memory()
        embedding = decoder(model).get_input_embeddings()  # type: ignore[operator]
        self._vocabulary: int = embedding.num_embeddings
        self.d_model: int = embedding.embedding_dim

    def write_shard(self, path: Path, pairs: Sequence[Pair]) -> Extracted:
        """Write one safetensors file with every layer x pooling of these traces; rows in the order of ``pairs``.

        Raises:
            StorageError: writing failed.
            ModelError: a value does not fit the stored dtype, or the model gives NaN or infinity.
            UserError: a single trace does not fit the device's memory.
        """
        sequences, rows = self._prepare(pairs)
        with ShardWriter(path, layers=self.layers, rows=rows, d_model=self.d_model, dtype=self.store_dtype) as writer:
            halvings = self._run(sequences, writer.put)
        absent = {pooling: sum(not s.spans[pooling] for s in sequences) for pooling in self.poolings}
        return Extracted(rows, absent, halvings)

    def extract(self, pairs: Sequence[Pair]) -> dict[tuple[int, str], Tensor]:
        """The same rows in memory: {(layer, pooling): [R, D]} in the stored dtype."""
        sequences, rows = self._prepare(pairs)
        dtype, _ = DTYPES[self.store_dtype]
        out = {
            (layer, pooling): torch.empty(rows[pooling], self.d_model, dtype=dtype) for layer in self.layers for pooling in self.poolings
        }

        def keep(pieces: list[Piece]) -> None:
            for layer, pooling, row, rows_RD in pieces:
                out[layer, pooling][row : row + len(rows_RD)] = rows_RD

        self._run(sequences, keep)
        return out

    def self_check(self, pairs: Sequence[Pair]) -> float:
        """Compare the batched path with a plain forward, one sequence at a time, on a few of these traces.

        Returns:
            The largest relative difference of a row.
        Raises:
            ModelError: it is above the tolerance of the model's dtype.
        """
        sequences, _ = self._prepare(pairs)
        sample = _a_few(sequences, self.batch_tokens)
        if not sample:
            return 0.0
        tolerance = TOLERANCE[next(self.model.parameters()).dtype]
        batched = self._forward(sample, torch.float32)
        worst, where = 0.0, ""
        for number, sequence in enumerate(sample):
            plain = plain_forward(self.model, sequence.ids, self.layers)
            for layer in self.layers:
                expected_RD = _pool_one(plain[layer], sequence, self.poolings)
                got_RD = _rows_of(batched[layer], sample, self.poolings, number)
                difference = (got_RD - expected_RD.cpu()).norm(dim=1) / expected_RD.cpu().norm(dim=1).clamp_min(1e-30)
                value = float(difference.max())
                if not value <= worst:  # NaN counts as the worst
                    worst, where = value, f"trace {sequence.key}, layer {layer}"
        if not worst <= tolerance:
            raise ModelError(
                f"self-check failed: {where}: batched activations differ from a plain forward by {worst:.2g} of their norm "
                f"(at most {tolerance:g} expected for {next(self.model.parameters()).dtype}); this model or attention implementation "
                "does not allow right-padded batches: set extract_activations.batch_tokens=1 to run traces one by one"
            )
        return worst

    def _prepare(self, pairs: Sequence[Pair]) -> tuple[list[_Sequence], dict[str, int]]:
        counts = dict.fromkeys(self.poolings, 0)
        sequences = []
        for trace, label in pairs:
            found = {pooling: spans(pooling, trace, label) for pooling in self.poolings}
            needed = max((span.end_token for rows in found.values() for span in rows), default=None)
            length = 0 if needed is None else len(trace.prompt_ids) + needed
            ids = (trace.prompt_ids + trace.completion_ids)[:length]
            if ids and max(ids) >= self._vocabulary:
                raise DataError(
                    f"trace {trace.key}: token id {max(ids)}, but the model has {self._vocabulary}; was it sampled from another model?"
                )
            sequences.append(_Sequence(trace.key, ids, len(trace.prompt_ids), found, dict(counts)))
            for pooling, rows in found.items():
                counts[pooling] += len(rows)
        return sequences, counts

    def _run(self, sequences: Sequence[_Sequence], sink: Callable[[list[Piece]], None]) -> int:
        """Run all batches; returns how often memory ran out and the budget was halved (it is whole again in the next call)."""
        before = self.batches.halvings
        for batch, stored in self.batches.run(sequences, lambda batch: self._forward(batch, DTYPES[self.store_dtype][0])):
            sink(list(self._pieces(stored, batch)))
        return self.batches.halvings - before

    def _forward(self, batch: Sequence[_Sequence], dtype: torch.dtype) -> dict[int, Tensor]:
        """One batch: {layer: [R, D]} on the CPU, rows by pooling, then by sequence, then by span."""
        width = max(len(s.ids) for s in batch)
        ids_BL = torch.zeros(len(batch), width, dtype=torch.long)
        for number, sequence in enumerate(batch):
            ids_BL[number, : len(sequence.ids)] = torch.tensor(sequence.ids)
        pool = _Pool(batch, self.poolings, width)
        pooled: dict[int, Tensor] = {}

        def see(layer: int) -> Callable[[Tensor], None]:
            return lambda hidden_BLD: pooled.__setitem__(layer, pool(hidden_BLD).to(dtype))

        self._read(ids_BL.to(self.device), {layer: see(layer) for layer in self.layers})
        stored = {layer: rows_RD.to("cpu") for layer, rows_RD in pooled.items()}
        for layer, rows_RD in stored.items():
            if not torch.isfinite(rows_RD).all():
                self._refuse(batch, layer, rows_RD, dtype)
        return stored

    def _pieces(self, stored: dict[int, Tensor], batch: Sequence[_Sequence]) -> Iterator[Piece]:
        for layer, rows_RD in stored.items():
            start = 0
            for pooling in self.poolings:
                for sequence in batch:
                    end = start + len(sequence.spans[pooling])
                    if end > start:
                        yield Piece(layer, pooling, sequence.first_row[pooling], rows_RD[start:end])
                    start = end

    def _refuse(self, batch: Sequence[_Sequence], layer: int, stored_RD: Tensor, dtype: torch.dtype) -> None:
        bad = int((~torch.isfinite(stored_RD)).any(1).nonzero()[0])
        keys = [s.key for pooling in self.poolings for s in batch for _ in s.spans[pooling]]
        where = f"trace {keys[bad]}, {hook_point(layer)}"
        exact_RD = self._forward(batch, torch.float32)[layer] if dtype == torch.float16 else stored_RD
        # without an overflow, the recursive call has already refused the model's own NaN or infinity
        if torch.isfinite(exact_RD).all():
            peak, limit = float(exact_RD[bad].abs().max()), torch.finfo(dtype).max
            raise ModelError(f"{where}: {peak:,.0f} overflows float16 (largest {limit:,.0f}); set extract_activations.store_dtype=bfloat16")
        raise ModelError(f"{where}: the model itself gives NaN or infinity; load it with model.dtype=bfloat16 or float32")


class _Pool:
    """Pools a batch's residual stream in float32, on its device: [B, L, D] -> [R, D]."""

    def __init__(self, batch: Sequence[_Sequence], poolings: Sequence[str], width: int) -> None:
        self._single_rows: list[int] = []
        self._single_from: list[int] = []  # index into B * L
        self._means: list[tuple[int, int, int, int]] = []  # row, sequence, start, end
        row = 0
        for pooling in poolings:
            for number, sequence in enumerate(batch):
                for span in sequence.spans[pooling]:
                    start, end = sequence.prompt_len + span.start_token, sequence.prompt_len + span.end_token
                    if end - start == 1:
                        self._single_rows.append(row)
                        self._single_from.append(number * width + start)
                    else:
                        self._means.append((row, number, start, end))
                    row += 1
        self._count = row

    def __call__(self, hidden_BLD: Tensor) -> Tensor:
        device = hidden_BLD.device
        rows_RD = torch.empty(self._count, hidden_BLD.shape[-1], dtype=torch.float32, device=device)
        if self._single_rows:
            gathered = hidden_BLD.flatten(0, 1).index_select(0, torch.tensor(self._single_from, device=device))
            rows_RD[torch.tensor(self._single_rows, device=device)] = gathered.float()
        for row, number, start, end in self._means:
            rows_RD[row] = hidden_BLD[number, start:end].mean(0, dtype=torch.float32)
        return rows_RD


def check_layers(layers: Sequence[int], n_layers: int, field: str) -> None:
    """Raises ModelError, naming the field, when a layer is out of range."""
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ModelError(f"{field}: no layer {layer}; the model has {n_layers} layers, 0 to {n_layers - 1}")


def _pool_one(hidden_LD: Tensor, sequence: _Sequence, poolings: Sequence[str]) -> Tensor:
    """The plain way, for the self-check: a float32 mean per span, [R, D]."""
    chosen = [span for pooling in poolings for span in sequence.spans[pooling]]
    offset = sequence.prompt_len
    return torch.stack([hidden_LD[offset + span.start_token : offset + span.end_token].float().mean(0) for span in chosen])


def _rows_of(rows_RD: Tensor, batch: Sequence[_Sequence], poolings: Sequence[str], number: int) -> Tensor:
    owner = [index for pooling in poolings for index, sequence in enumerate(batch) for _ in sequence.spans[pooling]]
    return rows_RD[torch.tensor(owner) == number]


def _a_few(sequences: Sequence[_Sequence], budget: int) -> list[_Sequence]:
    """Up to three sequences of different lengths that fit one batch, the shortest among them."""
    ordered = sorted((s for s in sequences if s.ids), key=lambda s: (len(s.ids), s.key))
    picks = [ordered[len(ordered) * part // 4] for part in range(SELF_CHECK_TRACES)] if ordered else []
    few = list({s.key: s for s in picks}.values())
    while len(few) > 1 and len(few) * len(few[-1].ids) > budget:
        few.pop()
    return few


def _keep_freed_memory() -> None:
    """Let the C library keep what a layer frees (up to 64 MiB) for the next one.

    glibc gives large freed blocks back to the system, and every layer's page faults then cost a sixth of the time;
    its limit follows the largest block freed so far, up to 32 MiB. Measured: benchmarks/extraction.py.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
