"""The vectors that examples ask for: one pass over each trace for all its questions, tokens and layers, or none at all.

Rows that the activation store holds are read from there. What is missing is read in batches of traces, adapter off, and
nothing runs after the deepest wanted block. Batches are a function of the examples that are asked for together.

Shapes: B traces, L tokens, D model width, K vectors of one example, P places (row of the batch, token).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tribunal.activations.batches import Batches
from tribunal.activations.extraction import check_layers
from tribunal.activations.store import ActivationSet
from tribunal.core.errors import DataError, ModelError, UserError
from tribunal.core.records import Trace
from tribunal.models.loading import LoadedModel, identity
from tribunal.models.residual import input_device, read_residual
from tribunal.oracle.examples import Example
from tribunal.traces.files import TraceFile

Place = tuple[int, int]
"""A token of a trace (index into completion_ids, -1 = last prompt token) and a layer."""


class _Wanted(NamedTuple):
    """A trace to be run: its ids up to the last wanted token, and what is read of it."""

    key: str
    ids: list[int]
    prompt_len: int
    places: set[Place]


class _Read(NamedTuple):
    """What one pass read of a layer: states, and the row of each (trace, token)."""

    rows_PD: Tensor
    places: dict[tuple[str, int], int]

    def at(self, key: str, tokens: Sequence[int]) -> Tensor:
        return self.rows_PD[[self.places[key, token] for token in tokens]]


class ActivationSource:
    """Hands out the vectors of examples.

    Args:
        loaded: the model that the traces were sampled from; an adapter on it is switched off while it is read.
        traces: the traces that examples speak of.
        store: what extract_activations kept, or None.
        batch_tokens: tokens in a batch, padding included; None takes 512 on a CPU and 16384 on a GPU.
    Raises:
        UserError: the store holds another model's activations.
    """

    def __init__(self, loaded: LoadedModel, traces: TraceFile, store: ActivationSet | None, *, batch_tokens: int | None = None) -> None:
        self.loaded = loaded
        self.traces = traces
        self.store = store
        self.passes = 0
        """Traces run through the model so far; ``read``: examples whose vectors came from the store. For receipts and tests."""
        self.read = 0
        self.device = input_device(loaded.model)
        self.batches = Batches(batch_tokens, self.device)
        self._numbers = {key: number for number, key in enumerate(traces.keys)}
        self._stored: dict[str, dict[int, tuple[str, int]]] = {}
        if store is not None:
            self._check_store(store)
            self._stored = _single_tokens(store)

    def vectors(self, examples: Iterable[Example]) -> Iterator[tuple[str, Tensor]]:
        """(key of the example, its vectors [K, D] in float32 on the CPU, layer by layer), grouped by trace.

        Raises:
            DataError: an example speaks of a trace or a token that is not there.
            ModelError: a layer is out of range, or the model gives NaN or infinity.
            UserError: one trace alone does not fit the memory.
        """
        by_trace: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            by_trace[example.trace_key].append(example)
        check_layers(sorted({layer for known in by_trace.values() for e in known for layer in e.layers}), self.loaded.n_layers, "layers")
        stored = {key: [e for e in known if self._in_store(e)] for key, known in by_trace.items()}
        self.read += sum(map(len, stored.values()))
        yield from self._from_store([e for known in stored.values() for e in known])
        missing = {key: [e for e in known if not self._in_store(e)] for key, known in by_trace.items()}
        wanted = [self._wanted(key, known) for key, known in missing.items() if known]
        for batch, read in self.batches.run(wanted, self._run):
            for one in batch:
                for example in missing[one.key]:
                    yield example.key, torch.cat([read[layer].at(one.key, example.tokens) for layer in example.layers])

    def _in_store(self, example: Example) -> bool:
        tokens = self._stored.get(example.trace_key, {})
        return self.store is not None and set(example.layers) <= set(self.store.layers) and all(t in tokens for t in example.tokens)

    def _from_store(self, examples: Sequence[Example]) -> Iterator[tuple[str, Tensor]]:
        """A read for each layer and pooling, of just the rows that are wanted there."""
        if not examples or self.store is None:
            return
        places: dict[tuple[int, str], list[tuple[int, int, int]]] = defaultdict(list)  # (example, which vector, row)
        for number, example in enumerate(examples):
            for which, (layer, token) in enumerate((layer, token) for layer in example.layers for token in example.tokens):
                pooling, row = self._stored[example.trace_key][token]
                places[layer, pooling].append((number, which, row))
        out = [torch.empty(example.n_vectors, self.store.d_model) for example in examples]
        for (layer, pooling), listed in sorted(places.items()):
            rows_PD = self.store.read(layer, pooling, torch.float32, chosen=torch.tensor([row for _, _, row in listed]))
            for (number, which, _), vector_D in zip(listed, rows_PD):
                out[number][which] = vector_D
        yield from ((example.key, vectors_KD) for example, vectors_KD in zip(examples, out))

    def _wanted(self, key: str, examples: Sequence[Example]) -> _Wanted:
        trace = self._trace(key)
        places = {(token, layer) for e in examples for layer in e.layers for token in e.tokens}
        last = max(token for token, _ in places)
        first = min(token for token, _ in places)
        if last >= len(trace.completion_ids) or len(trace.prompt_ids) + first < 0:
            raise DataError(f"trace {key}: no token {last if last > 0 else first}; the examples were made of other traces: make them again")
        return _Wanted(key, (trace.prompt_ids + trace.completion_ids)[: len(trace.prompt_ids) + last + 1], len(trace.prompt_ids), places)

    def _trace(self, key: str) -> Trace:
        if key not in self._numbers:
            raise DataError(f"{self.traces.path}: no trace {key}; the examples were made of other traces: make them again")
        return next(self.traces.read([self._numbers[key]]))

    def _run(self, batch: Sequence[_Wanted]) -> Mapping[int, _Read]:
        """One pass: the wanted states by layer."""
        ids_BL = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
        by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, wanted in enumerate(batch):
            ids_BL[row, : len(wanted.ids)] = torch.tensor(wanted.ids)
            for token, layer in sorted(wanted.places):
                by_layer[layer].append((row, token))
        read: dict[int, Tensor] = {}

        def see(layer: int) -> Callable[[Tensor], None]:
            rows_P = torch.tensor([row for row, _ in by_layer[layer]])
            tokens_P = torch.tensor([batch[row].prompt_len + token for row, token in by_layer[layer]])

            def keep(hidden_BLD: Tensor) -> None:
                read[layer] = hidden_BLD[rows_P.to(hidden_BLD.device), tokens_P.to(hidden_BLD.device)].float()

            return keep

        with _as_base(self.loaded.model):
            read_residual(self.loaded.model, ids_BL.to(self.device), {layer: see(layer) for layer in by_layer})
        self.passes += len(batch)
        found: dict[int, _Read] = {}
        for layer, rows_PD in read.items():
            rows_PD = rows_PD.cpu()
            if not torch.isfinite(rows_PD).all():
                raise ModelError(f"layer {layer}: the model gives NaN or infinity; load it with model.dtype=bfloat16 or float32")
            found[layer] = _Read(rows_PD, {(batch[row].key, token): number for number, (row, token) in enumerate(by_layer[layer])})
        return found

    def _check_store(self, store: ActivationSet) -> None:
        ours = identity(self.loaded)
        differing = [f"{name}: {store.meta.model.get(name)}, now {ours[name]}" for name in ours if store.meta.model.get(name) != ours[name]]
        if differing:
            raise UserError(
                f"{store.folder}: activations of another model ({'; '.join(differing)}); "
                "run extract_activations again, or leave the store out"
            )


def _single_tokens(store: ActivationSet) -> dict[str, dict[int, tuple[str, int]]]:
    """{trace: {token: (pooling, row)}} of the rows that are one token's state, not a mean; the first pooling that has it counts."""
    found: dict[str, dict[int, tuple[str, int]]] = defaultdict(dict)
    for pooling in store.poolings:
        for number, row in enumerate(store.rows(pooling)):
            if row.end_token - row.start_token == 1:
                found[row.key].setdefault(row.start_token, (pooling, number))
    return found


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """While the context is open, every PEFT layer passes its base layer through and nothing is dropped out.

    Works on the layers, since ``loaded.model`` is the object inside PEFT's wrapper and does not know of it.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "disable_adapters", None) is False]
    learning = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    training = [module for module in model.modules() if module.training]
    for layer in layers:
        layer.enable_adapters(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for module in training:
            module.training = True
        for parameter, flag in learning:  # PEFT makes adapters trainable when it switches them on
            parameter.requires_grad_(flag)
