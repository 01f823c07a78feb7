"""The residual stream of a Hugging Face decoder: the one hook through which it is read, and through which it is changed.

Layer L is the output of block L, 0-based (TransformerLens: ``blocks.L.hook_resid_post``). The last block's output is
taken before the final norm, which ``output_hidden_states`` cannot give. Three changes are made to it: vectors are
injected at placeholder tokens of a prompt (``inject``), rows of a batch are steered or a direction is projected out
while they are being generated (``Steering``).

Shapes: B sequences, L tokens, D model width, K injected vectors, I interventions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tribunal.core.errors import ModelError
from tribunal.core.storage import sha256_json

Edit = Callable[[Tensor], Tensor | None]
"""Called with a block's output [B, L, D]; returns None to leave it, or what takes its place."""
Reader = Callable[[Tensor, Mapping[int, Callable[[Tensor], None]]], None]
"""``reader(ids_BL, {layer: see})``: run the ids and call ``see`` with each layer's residual stream [B, L, D]."""

BLOCK_LISTS = ("layers", "h")


def hook_point(layer: int) -> str:
    """The TransformerLens name of a layer."""
    return f"blocks.{layer}.hook_resid_post"


def decoder(model: nn.Module) -> nn.Module:
    """The module that runs embedding and blocks, without the language-model head; found through PEFT wrappers."""
    unwrap: Any = getattr(model, "get_base_model", None)
    unwrapped: Any = unwrap() if unwrap else model
    inner: Any = getattr(unwrapped, "base_model", unwrapped)
    inner = getattr(inner, "language_model", inner)  # the text part of a multimodal model
    if not any(isinstance(getattr(inner, name, None), nn.ModuleList) for name in BLOCK_LISTS):
        raise ModelError(
            f"{type(unwrapped).__name__}: no list of blocks found (looked for {', '.join(BLOCK_LISTS)} in {type(inner).__name__}); "
            "supported are decoders laid out like Llama, Qwen2, Qwen3 and GPT-2"
        )
    return inner


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks in order: ``model.model.layers`` (Llama, Qwen2, Qwen3, ...), ``transformer.h`` (GPT-2).

    Raises:
        ModelError: the model has another layout.
    """
    inner = decoder(model)
    return next(found for name in BLOCK_LISTS if isinstance(found := getattr(inner, name, None), nn.ModuleList))


def input_device(model: nn.Module) -> torch.device:
    """Where input ids go: the device of the embedding (the CPU while its weights are offloaded)."""
    embedding: Any = decoder(model)
    device = next(embedding.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def columns_to_keep(model: nn.Module, columns: Tensor) -> Any:
    """``columns`` as the argument ``logits_to_keep``.

    Of a model split over devices as a list: a tensor would be taken to the first device, while the last states lie on another.
    """
    return columns.tolist() if is_split(model) else columns


def is_split(model: nn.Module) -> bool:
    """Whether a device map has put a model's parts on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@contextmanager
def residual_hooks(model: nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """While the context is open, call ``edits[layer]`` with that block's output at every forward pass.

    Contexts nest: an inner one sees what an outer one put in place. Hooks are gone when the context ends, however it ends.

    Raises:
        ModelError: the model has no such layer.
    """
    found = blocks(model)
    for layer in edits:
        if not 0 <= layer < len(found):
            raise ModelError(f"layer {layer}: the model has {len(found)} layers, 0 to {len(found) - 1}")
    handles = []
    try:
        for layer, edit in edits.items():
            handles.append(found[layer].register_forward_hook(_as_hook(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)  # some blocks return (hidden, cache, ...)
        new = edit(output[0] if is_tuple else output)
        if new is None:
            return None
        return (new, *output[1:]) if is_tuple else new

    return hook


class _DeepestReached(Exception):
    """Ends a forward pass after the deepest wanted block."""


def _end_here(hidden_BLD: Tensor) -> None:
    raise _DeepestReached


@torch.no_grad()
def read_residual(model: nn.Module, ids_BL: Tensor, readers: Mapping[int, Callable[[Tensor], None]]) -> None:
    """Run the blocks up to the deepest wanted one, and no further; no final norm, no head, no cache.

    No attention mask is given: under causal attention the tokens of a right-padded row never see its padding, and
    without a mask the fast causal kernels apply. So rows must be padded on the right, and rows of padding be ignored.

    Args:
        ids_BL: token ids, right-padded with any valid id.
        readers: by layer, called with the residual stream [B, L, D] in the model's dtype, on the block's device.
    """
    with residual_hooks(model, readers), residual_hooks(model, {max(readers): _end_here}):
        try:
            decoder(model)(input_ids=ids_BL.to(input_device(model)), use_cache=False)
        except _DeepestReached:
            return
    raise AssertionError("the deepest block never ran")


def capture(model: nn.Module, ids_BL: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """The residual stream after each of these blocks, {layer: [B, L, D]}; see ``read_residual`` for padding."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda hidden_BLD: kept.__setitem__(layer, hidden_BLD)

    read_residual(model, ids_BL, {layer: keep(layer) for layer in layers})
    return kept


@torch.no_grad()
def plain_forward(model: nn.Module, ids: list[int], layers: Iterable[int]) -> dict[int, Tensor]:
    """Reference for self-checks: one sequence, the whole decoder, transformers' own ``output_hidden_states``.

    Only the last block's output, which transformers gives after the final norm alone, is read by a hook.

    Returns:
        {layer: [L, D]} in the model's dtype.
    """
    last = len(blocks(model)) - 1
    kept: list[Tensor] = []
    with residual_hooks(model, {last: kept.append}):
        ids_1L = torch.tensor([ids], device=input_device(model))
        hidden = decoder(model)(input_ids=ids_1L, use_cache=False, output_hidden_states=True).hidden_states
    return {layer: (kept[0] if layer == last else hidden[layer + 1])[0] for layer in layers}


@contextmanager
def inject(
    model: nn.Module,
    vectors_KD: Tensor,
    rows_K: Tensor,
    positions_K: Tensor,
    *,
    layer: int = 1,
    scale: float = 1.0,
    mode: Literal["add", "replace"] = "add",
    norm_matched: bool = True,
) -> Iterator[None]:
    """While the context is open, put vectors into the residual stream after one block, at given tokens of the prompt.

    With h the state at the token and v its vector, ``add`` gives h + scale |h| v/|v| and ``replace`` scale |h| v/|v|;
    without ``norm_matched`` the vector is scale v as it is. What is put in is detached: gradients flow through h alone.
    A vector of zeros adds nothing. Passes over a single token (cached generation) are left alone. Rows may have
    different numbers of vectors. Training with gradient checkpointing runs blocks again during the backward pass, so
    the context must stay open until that is done.

    Args:
        vectors_KD: in any dtype; taken to the model's.
        rows_K, positions_K: for each vector its row of the batch and its token in that row, padding counted.
    Source: Karvonen et al. (2025), Activation Oracles, whose released code adds, with |v| matched to |h|.
    """
    assert vectors_KD.ndim == 2 and len(vectors_KD) == len(rows_K) == len(positions_K), "one row and one position for each vector"

    def edit(hidden_BLD: Tensor) -> Tensor | None:
        if hidden_BLD.shape[1] == 1:
            return None
        place = rows_K.to(hidden_BLD.device), positions_K.to(hidden_BLD.device)
        at_KD = hidden_BLD[place]
        put_KD = vectors_KD.to(hidden_BLD.device, torch.float32)
        if norm_matched:
            length_K1 = put_KD.norm(dim=-1, keepdim=True)
            unit_KD = put_KD / length_K1.where(length_K1 > 0, 1)
            put_KD = unit_KD * at_KD.detach().float().norm(dim=-1, keepdim=True)
        put_KD = (scale * put_KD).detach().to(hidden_BLD.dtype)
        return hidden_BLD.index_put(place, at_KD + put_KD if mode == "add" else put_KD)

    with residual_hooks(model, {layer: edit}):
        yield


class Gate(NamedTuple):
    """Open at the tokens whose state h, before the change, has ``h @ vector < below``."""

    vector_D: Tensor
    below: float


@dataclass(frozen=True, eq=False)
class Change:
    """What is done to a token's state h after one block: h - (h.u) u + ``add``, with u the unit vector along ``remove``."""

    layer: int
    add_D: Tensor | None = None
    remove_D: Tensor | None = None
    gate: Gate | None = None


class Steering:
    """Named interventions, each row of a batch under its own; one vectorised edit per layer.

    Args:
        interventions: by name, the changes made together. The name ``""`` is no intervention and always known.

    Call ``aim`` before each forward pass inside ``residual_hooks(model, steering.edits())``.
    """

    def __init__(self, interventions: Mapping[str, Sequence[Change]]) -> None:
        self.index = {"": 0, **{name: i for i, name in enumerate(interventions, 1)}}
        assert len(self.index) == len(interventions) + 1, "an intervention needs a name"
        changes = [(self.index[name], change) for name, listed in interventions.items() for change in listed]
        places = [(i, change.layer) for i, change in changes]
        assert len(set(places)) == len(places), "an intervention has one change per layer"
        self._tables = {layer: self._table(layer, changes) for layer in sorted({change.layer for _, change in changes})}
        self._rows_B = torch.empty(0, dtype=torch.long)
        self._starts_B: Tensor | None = None

    def _table(self, layer: int, changes: Sequence[tuple[int, Change]]) -> dict[str, Tensor]:
        """Rows by intervention: what to add, the unit vector to remove, and the gate (0 @ h < inf is always open)."""
        ours = [(i, change) for i, change in changes if change.layer == layer]
        vectors = [v for _, c in ours for v in (c.add_D, c.remove_D, c.gate.vector_D if c.gate else None) if v is not None]
        assert vectors, f"a change at layer {layer} neither adds nor removes"
        width = len(vectors[0])
        add_ID, unit_ID, gate_ID = (torch.zeros(len(self.index), width) for _ in range(3))
        below_I = torch.full((len(self.index),), math.inf)
        for i, change in ours:
            if change.add_D is not None:
                add_ID[i] = change.add_D.float()
            if change.remove_D is not None:
                unit_ID[i] = change.remove_D.float() / change.remove_D.float().norm()
            if change.gate is not None:
                gate_ID[i], below_I[i] = change.gate.vector_D.float(), change.gate.below
        return {"add": add_ID, "unit": unit_ID, "gate": gate_ID, "below": below_I}

    @cached_property
    def digest(self) -> str:
        """Of all names and numbers: equal for two objects that do the same."""
        numbers = hashlib.sha256()
        for layer, table in self._tables.items():
            for tensor in table.values():
                numbers.update(tensor.cpu().numpy().tobytes())
            numbers.update(str(layer).encode())
        return sha256_json([self.index, numbers.hexdigest()])

    def aim(self, names: Sequence[str], starts: Sequence[int] | None = None) -> None:
        """Say which intervention each row of the next forward pass is under.

        Args:
            names: by row.
            starts: by row, the first token that is changed; None: all tokens are (a step of cached generation).
        """
        self._rows_B = torch.tensor([self.index[name] for name in names])
        self._starts_B = None if starts is None else torch.tensor(starts)

    def edits(self) -> dict[int, Edit]:
        """For ``residual_hooks``."""
        return {layer: self._edit_of(layer) for layer in self._tables}

    def _edit_of(self, layer: int) -> Edit:
        def edit(hidden_BLD: Tensor) -> Tensor | None:
            assert len(self._rows_B) == len(hidden_BLD), "aim() names the rows of each forward pass"
            table = self._tables[layer]
            if table["add"].device != hidden_BLD.device:
                table = self._tables[layer] = {name: tensor.to(hidden_BLD.device) for name, tensor in table.items()}
            rows_B = self._rows_B.to(hidden_BLD.device)
            h_BLD = hidden_BLD.float()
            add_B1D, unit_B1D, gate_B1D = (table[name][rows_B][:, None] for name in ("add", "unit", "gate"))
            along_BL1 = (h_BLD * unit_B1D).sum(-1, keepdim=True)
            open_BL1 = (h_BLD * gate_B1D).sum(-1, keepdim=True) < table["below"][rows_B][:, None, None]
            if self._starts_B is not None:
                tokens_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
                open_BL1 = open_BL1 & (tokens_L >= self._starts_B.to(hidden_BLD.device)[:, None])[..., None]
            changed_BLD = (h_BLD - along_BL1 * unit_B1D + add_B1D).to(hidden_BLD.dtype)
            return torch.where(open_BL1, changed_BLD, hidden_BLD)

        return edit
