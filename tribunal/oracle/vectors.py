"""Vectors kept on the disk while an oracle is trained or asked: each state of a trace once, however many questions are about it.

A file holds the rows of some hundred traces as one tensor in the model's dtype. It is memory-mapped, so an oracle's examples
may need more memory than there is.

R rows, K vectors of one example, D model width
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tribunal.core.errors import CorruptError
from tribunal.core.storage import storage_errors, write_file
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.examples import Example


class VectorLayout:
    """Which states the examples need, and where they lie: a pure function of the examples and their order.

    Args:
        examples: all that will be asked for.
        traces_per_file: traces that share a file.
    """

    def __init__(self, examples: Iterable[Example], traces_per_file: int) -> None:
        wanted: dict[str, dict[int, set[int]]] = {}
        self._trace: dict[str, tuple[str, int]] = {}
        for example in examples:
            by_layer = wanted.setdefault(example.trace_key, defaultdict(set))
            self._trace[example.trace_key] = example.problem_id, example.sample
            for layer in example.layers:
                by_layer[layer].update(example.tokens)
        keys = list(wanted)
        self.files = [keys[start : start + traces_per_file] for start in range(0, len(keys), traces_per_file)]
        self._tokens = {(key, layer): sorted(tokens) for key, layers in wanted.items() for layer, tokens in sorted(layers.items())}
        self._row: dict[tuple[str, int], dict[int, int]] = {}
        self._file: dict[str, int] = {}
        self._layers = {key: sorted(layers) for key, layers in wanted.items()}
        for number, traces in enumerate(self.files):
            row = 0
            for key in traces:
                self._file[key] = number
                for layer in self._layers[key]:
                    tokens = self._tokens[key, layer]
                    self._row[key, layer] = {token: row + i for i, token in enumerate(tokens)}
                    row += len(tokens)

    def place(self, example: Example) -> tuple[int, list[int]]:
        """The file of an example's vectors and their rows in it, layer by layer."""
        rows = [self._row[example.trace_key, layer][token] for layer in example.layers for token in example.tokens]
        return self._file[example.trace_key], rows

    def write(self, number: int, source: ActivationSource, path: Path, dtype: torch.dtype) -> None:
        """Read a file's states, one pass per trace, and write it whole."""
        requests = [self._request(key, layer) for key in self.files[number] for layer in self._layers[key]]
        found = {key: vectors_KD.to(dtype) for key, vectors_KD in source.vectors(requests)}
        rows_RD = torch.cat([found[request.key] for request in requests])
        write_file(path, lambda temporary: save_file({"rows": rows_RD}, temporary))

    def _request(self, key: str, layer: int) -> Example:
        problem, sample = self._trace[key]
        return Example(
            key=f"{key}, layer {layer}",
            task="",
            problem_id=problem,
            group=problem,
            sample=sample,
            question="",
            target="",
            choices=[],
            tokens=self._tokens[key, layer],
            layers=[layer],
            stratum=None,
            split="train",
        )


class Vectors:
    """The written vectors of examples.

    Args:
        files: by number of the layout.
    """

    def __init__(self, layout: VectorLayout, files: Sequence[Path]) -> None:
        self.layout, self.files = layout, list(files)
        self._rows: dict[int, Tensor] = {}

    def of(self, example: Example) -> Tensor:
        """[K, D], float32."""
        number, rows = self.layout.place(example)
        return self._open(number)[rows].float()

    def _open(self, number: int) -> Tensor:
        if number not in self._rows:
            path = self.files[number]
            try:
                with storage_errors(path, "read"), safe_open(path, framework="pt") as file:
                    self._rows[number] = file.get_tensor("rows")
            except SafetensorError as error:
                raise CorruptError(f"{path}: {error}; the file was damaged: remove it and run the job again") from error
        return self._rows[number]
