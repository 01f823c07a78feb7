"""ActivationSet: pooled residual streams on the disk, one tensor [rows, d_model] per layer x pooling in every shard.

    acts-00000.safetensors ...   tensors named layer_<L>.<pooling>, bf16 / fp16 / fp32
    index.jsonl                  one line per row: shard, pooling, row, problem_id, sample, position, start_token, end_token
    activations.json             what holds for all of it: layers, poolings, dtype, model, shards with sha256, absent traces

A shard is written in place, row by row, while the next batch runs: neither writing nor reading one layer needs more
memory than a batch, or than that layer's rows.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tribunal.core.errors import CorruptError, UserError
from tribunal.core.registry import nearest
from tribunal.core.storage import iter_jsonl, read_json, storage_errors

META = "activations.json"
INDEX = "index.jsonl"
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}


class Row(BaseModel):
    """One line of the index; a row's group in every split is its ``problem_id``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    pooling: str
    row: int
    problem_id: str
    sample: int
    position: int
    start_token: int
    end_token: int

    @property
    def key(self) -> str:
        return f"{self.problem_id}/{self.sample}"


class ShardFile(BaseModel):
    """One file of the set: its name, hash and number of rows by pooling."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    rows: dict[str, int]


class Meta(BaseModel):
    """``activations.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: dict[str, Any]
    layers: list[int]
    hook_points: list[str]
    poolings: list[str]
    d_model: int
    dtype: str
    backend: str
    verdicts: list[str]
    template_sha256: list[str]
    traces: int
    absent: dict[str, int]
    shards: list[ShardFile]


def tensor_name(layer: int, pooling: str) -> str:
    return f"layer_{layer}.{pooling}"


class Piece(NamedTuple):
    """Rows of one tensor: they go to ``row`` and after."""

    layer: int
    pooling: str
    row: int
    rows_RD: Tensor


class ShardWriter:
    """Writes one safetensors file of known shape, piece by piece, in a thread of its own.

    What fails in the thread is raised by the next ``put`` or at the end of the ``with`` block. The file is complete
    when the block ends without an error; making it durable and naming it is the caller's part (``storage.write_file``).

    Args:
        path: the file to write.
        rows: number of rows by pooling.
        depth: batches that may wait; further ones make ``put`` wait.
    """

    def __init__(self, path: Path, *, layers: Sequence[int], rows: Mapping[str, int], d_model: int, dtype: str, depth: int = 2) -> None:
        self.path = path
        self.dtype, code = DTYPES[dtype]
        self.row_bytes = d_model * self.dtype.itemsize
        self._missing = {tensor_name(layer, pooling): rows[pooling] for layer in layers for pooling in rows}
        self._start: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, count in self._missing.items():
            self._start[name] = end
            end += count * self.row_bytes
            header[name] = {"dtype": code, "shape": [count, d_model], "data_offsets": [self._start[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors aligned to 8 bytes
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end
        self._queue: queue.Queue[list[Piece] | None] = queue.Queue(depth)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, name="shard-writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        with storage_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._thread.start()
        return self

    def put(self, pieces: list[Piece]) -> None:
        """Hand over a batch's rows, in the stored dtype and on the CPU; waits while ``depth`` batches are ahead."""
        self._raise_failure()
        self._queue.put(pieces)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)
        if error is None:
            self._raise_failure()
            missing = {name: count for name, count in self._missing.items() if count}
            assert not missing, f"{self.path}: rows never written: {missing}"

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with storage_errors(self.path):
                raise self._failure

    def _write_all(self) -> None:
        try:
            os.ftruncate(self._file, self._size)
            self._write_at(memoryview(self._header), 0)
        except BaseException as failure:  # noqa: BLE001 - raised in the main thread
            self._failure = failure
        while (pieces := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # keep emptying the queue, so that the main thread never waits for a dead writer
            try:
                for piece in pieces:
                    self._write_piece(piece)
            except BaseException as failure:  # noqa: BLE001 - raised in the main thread
                self._failure = failure

    def _write_piece(self, piece: Piece) -> None:
        name = tensor_name(piece.layer, piece.pooling)
        assert piece.rows_RD.dtype == self.dtype
        data = memoryview(piece.rows_RD.contiguous().view(torch.uint8).numpy().reshape(-1).data)
        self._write_at(data, len(self._header) + self._start[name] + piece.row * self.row_bytes)
        self._missing[name] -= len(piece.rows_RD)

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written


class ActivationSet:
    """A finished set of activations; open it with ``ActivationSet.open(folder)``."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta
        self.layers = meta.layers
        self.poolings = meta.poolings
        self.d_model = meta.d_model
        self._rows: dict[str, list[Row]] = {}

    @classmethod
    def open(cls, folder: Path) -> ActivationSet:
        """Open the results of ``extract_activations``.

        Raises:
            CorruptError: the header is damaged or of another version.
        """
        try:
            return cls(folder, Meta.model_validate(read_json(folder / META)))
        except ValueError as error:
            raise CorruptError(f"{folder / META}: {' '.join(str(error).split())}; is it of another version?") from None

    def rows(self, pooling: str) -> list[Row]:
        """The rows of a pooling, in the order of ``read``; other poolings' lines are skipped, not held."""
        self._known("pooling", pooling, self.poolings)
        if pooling not in self._rows:
            kept = [row for row in iter_jsonl(self.folder / INDEX, Row) if row.pooling == pooling]
            expected = sum(shard.rows[pooling] for shard in self.meta.shards)
            if len(kept) != expected:
                raise CorruptError(
                    f"{self.folder / INDEX}: {len(kept)} rows of '{pooling}', {META} says {expected}; run extract_activations again"
                )
            self._rows[pooling] = kept
        return self._rows[pooling]

    def read(self, layer: int, pooling: str, dtype: torch.dtype | None = None, *, chosen: Tensor | None = None) -> Tensor:
        """One layer's rows, [rows, d_model], in the order of ``rows``.

        Shards are memory-mapped, so what is not chosen takes no memory. All rows of a set of one shard stay mapped.

        Args:
            dtype: what to convert to; by default the stored one.
            chosen: numbers of the rows wanted, [K], in the order wanted; by default all.
        """
        self._known("layer", layer, self.layers)
        self._known("pooling", pooling, self.poolings)
        stored, _ = DTYPES[self.meta.dtype]
        if chosen is None and len(self.meta.shards) == 1:
            return self._part(0, layer, pooling).to(dtype or stored)
        count = sum(shard.rows[pooling] for shard in self.meta.shards) if chosen is None else len(chosen)
        out_KD = torch.empty(count, self.d_model, dtype=dtype or stored)
        start = 0
        for number, shard in enumerate(self.meta.shards):
            end = start + shard.rows[pooling]
            if chosen is None:
                out_KD[start:end] = self._part(number, layer, pooling)
            elif (here_K := (start <= chosen) & (chosen < end)).any():
                out_KD[here_K] = self._part(number, layer, pooling)[chosen[here_K] - start].to(out_KD.dtype)
            start = end
        return out_KD

    def _part(self, number: int, layer: int, pooling: str) -> Tensor:
        path = self.folder / self.meta.shards[number].file
        try:
            with storage_errors(path, "read"), safe_open(path, framework="pt") as file:
                return file.get_tensor(tensor_name(layer, pooling))
        except SafetensorError as error:
            raise CorruptError(f"{path}: {error}; the file was damaged: run extract_activations again") from error

    def _known(self, what: str, value: object, known: Iterable[object]) -> None:
        known = list(known)
        if value not in known:
            hint = nearest(str(value), (str(k) for k in known)) if what == "pooling" else f"stored are {', '.join(map(str, known))}"
            raise UserError(f"{self.folder}: no activations of {what} '{value}'; {hint}")
