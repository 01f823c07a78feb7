"""The residual stream of a Hugging Face decoder: the one hook through which it is read, and through which it can be changed.

Layer L is the output of block L, 0-based (TransformerLens: ``blocks.L.hook_resid_post``). The last block's output is
taken before the final norm, which ``output_hidden_states`` cannot give.

Shapes: B sequences, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tribunal.core.errors import ModelError

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
