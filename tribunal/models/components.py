"""What writes into the residual stream: embedding, attention heads and MLPs, read one by one or replaced by their means.

The residual stream after block L is the embedding plus what every head and MLP up to block L added to it, so its
projection on a direction is the sum of their projections. A head's write is its slice of the attention output times its
slice of the output projection.

Shapes: B sequences, L tokens, D model width, N blocks read, H heads, d head width, C components, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tribunal.core.errors import ModelError
from tribunal.models.residual import blocks, read_residual

ATTENTION = ("self_attn", "attn")
OUT_PROJECTION = ("o_proj", "c_proj")
MLP = ("mlp",)
ABLATABLE = ("head", "mlp")
MOST_REST = 0.05
"""Largest rest between the stream and the sum of its parts, as a share of the parts' sizes; bfloat16's rounding leaves below 0.001."""


class Component(NamedTuple):
    """One writer: ``embedding``, ``head``, ``mlp``, or ``bias`` (the attention output biases of all blocks together)."""

    kind: str
    layer: int = -1
    head: int = -1

    @property
    def name(self) -> str:
        """How reports call it."""
        if self.kind == "head":
            return f"layer {self.layer}, head {self.head}"
        return f"layer {self.layer}, MLP" if self.kind == "mlp" else {"embedding": "embedding", "bias": "attention biases"}[self.kind]


class Writes(NamedTuple):
    """Token averages of what was written, float32, on the CPU."""

    embedding_BD: Tensor
    heads_BNI: Tensor  # what enters each output projection; I = H d
    mlps_BND: Tensor
    residual_BD: Tensor  # the stream itself after the deepest block read


class Means(NamedTuple):
    """Mean over tokens of what enters each output projection, and of each MLP's output, by block."""

    heads_NI: Tensor
    mlps_ND: Tensor


def writers(layer: int, heads: int, has_biases: bool) -> list[Component]:
    """All components up to a block, in the order of their contributions."""
    by_block = [[*(Component("head", n, h) for h in range(heads)), Component("mlp", n)] for n in range(layer + 1)]
    ends = [Component("bias")] if has_biases else []
    return [Component("embedding"), *(component for block in by_block for component in block), *ends]


class Components:
    """The components that write into the residual stream up to one block.

    Args:
        model: a decoder whose blocks add attention and MLP to the stream (Llama, Qwen2, Qwen3, GPT-2).
        layer: the block after which the stream is read.
    Raises:
        ModelError: the blocks have another layout.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.layer = model, layer
        self._blocks = list(blocks(model))[: layer + 1]
        self._projections = [_projection(block) for block in self._blocks]
        self._mlps = [_one_of(block, MLP) for block in self._blocks]
        config: Any = model.config
        self.heads = int(getattr(config, "get_text_config", lambda: config)().num_attention_heads)
        first = _weight(self._projections[0])
        if first.shape[1] % self.heads:
            raise ModelError(f"{type(model).__name__}: {first.shape[1]} attention outputs do not divide into {self.heads} heads")
        self.has_biases = any(getattr(projection, "bias", None) is not None for projection in self._projections)
        self.all = writers(layer, self.heads, self.has_biases)
        self.ablatable = [component for component in self.all if component.kind in ABLATABLE]

    @torch.no_grad()
    def read(self, ids_BL: Tensor, weights_BL: Tensor) -> Writes:
        """Run sequences and average what each component writes over tokens.

        Args:
            ids_BL: right-padded token ids.
            weights_BL: each token's share in its sequence's average; 0 for padding.
        """
        kept: dict[tuple[str, int], Tensor] = {}

        def average(hidden_BLX: Tensor) -> Tensor:
            return torch.einsum("bl,blx->bx", weights_BL.to(hidden_BLX.device), hidden_BLX.float()).cpu()

        def keep(kind: str, number: int) -> Callable[..., None]:
            return lambda *seen: kept.__setitem__((kind, number), average(_tensor(seen[-1])))

        with ExitStack() as stack:
            stack.enter_context(_hook(self._blocks[0].register_forward_pre_hook(keep("embedding", 0))))
            for number, (projection, mlp) in enumerate(zip(self._projections, self._mlps)):
                stack.enter_context(_hook(projection.register_forward_pre_hook(keep("heads", number))))
                stack.enter_context(_hook(mlp.register_forward_hook(keep("mlp", number))))
            read_residual(self.model, ids_BL, {self.layer: lambda hidden_BLD: keep("residual", 0)(hidden_BLD)})
        numbers = range(len(self._blocks))
        return Writes(
            kept["embedding", 0],
            torch.stack([kept["heads", n] for n in numbers], 1),
            torch.stack([kept["mlp", n] for n in numbers], 1),
            kept["residual", 0],
        )

    def contributions(self, writes: Writes, directions_KD: Tensor) -> Tensor:
        """Each component's projection on each direction, [B, C, K] in the order of ``all``; they sum to the stream's, up to rounding.

        Raises:
            ModelError: they do not, since the blocks scale or normalise what they add (Gemma, OLMo 2, Granite).
        """
        directions_DK = directions_KD.float().T
        found = [(writes.embedding_BD @ directions_DK)[:, None]]
        for number, projection in enumerate(self._projections):
            through_IK = _weight(projection).detach().float().cpu().T @ directions_DK
            parts_BHd = writes.heads_BNI[:, number].unflatten(-1, (self.heads, -1))
            found.append(torch.einsum("bhd,hdk->bhk", parts_BHd, through_IK.unflatten(0, (self.heads, -1))))
            found.append((writes.mlps_BND[:, number] @ directions_DK)[:, None])
        if self.has_biases:
            biases = [bias for p in self._projections if isinstance(bias := getattr(p, "bias", None), Tensor)]
            total_D = torch.stack([bias.detach().float().cpu() for bias in biases]).sum(0)
            found.append((total_D @ directions_DK).expand(len(writes.embedding_BD), 1, -1))
        parts_BCK = torch.cat(found, 1)
        rest_BK = (parts_BCK.sum(1) - writes.residual_BD @ directions_DK).abs() / parts_BCK.abs().sum(1)
        if not (rest := float(rest_BK.median())) <= MOST_REST:
            raise ModelError(
                f"{type(self.model).__name__}: what heads and MLPs write does not add up to the residual stream (a rest of {rest:.2g} of "
                f"the parts' sizes, at most {MOST_REST} expected): its blocks change what they add; supported are blocks laid out like "
                "Llama, Qwen2, Qwen3 and GPT-2"
            )
        return parts_BCK

    @contextmanager
    def ablate(self, chosen: Sequence[Component], means: Means) -> Iterator[None]:
        """While the context is open, each chosen head and MLP writes its mean, at every token.

        Source: mean ablation, e.g. Wang et al. (2022), arXiv:2211.00593.
        """
        wrong = [component.name for component in chosen if component not in self.ablatable]
        assert not wrong, f"cannot be ablated: {', '.join(wrong)}"
        with ExitStack() as stack:
            for number, (projection, mlp) in enumerate(zip(self._projections, self._mlps)):
                heads = [component.head for component in chosen if component.kind == "head" and component.layer == number]
                if heads:
                    hook = _replace_heads(heads, self.heads, means.heads_NI[number])
                    stack.enter_context(_hook(projection.register_forward_pre_hook(hook)))
                if Component("mlp", number) in chosen:
                    stack.enter_context(_hook(mlp.register_forward_hook(_replace_output(means.mlps_ND[number]))))
            yield


def _replace_heads(heads: Sequence[int], of: int, mean_I: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        parts = inputs[0].unflatten(-1, (of, -1)).clone()
        parts[..., heads, :] = mean_I.to(parts.device, parts.dtype).unflatten(-1, (of, -1))[heads]
        return (parts.flatten(-2), *inputs[1:])

    return hook


def _replace_output(mean_D: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        seen = _tensor(output)
        new = mean_D.to(seen.device, seen.dtype).expand_as(seen)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _tensor(seen: Any) -> Tensor:
    """The hidden states among a module's arguments or outputs."""
    return seen[0] if isinstance(seen, tuple) else seen


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _one_of(module: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise ModelError(
        f"{type(module).__name__}: none of {', '.join(names)} found; supported are blocks laid out like Llama, Qwen2, Qwen3 and GPT-2"
    )


def _projection(block: nn.Module) -> nn.Module:
    projection = _one_of(_one_of(block, ATTENTION), OUT_PROJECTION)
    _weight(projection)
    return projection


def _weight(projection: nn.Module) -> Tensor:
    """The output projection as [D, H d]."""
    if isinstance(projection, (Conv1D, nn.Linear)):
        if projection.weight.is_meta:
            raise ModelError("attribution reads the output projections, but some are offloaded; set another model.device_map")
        return projection.weight.T if isinstance(projection, Conv1D) else projection.weight
    raise ModelError(f"attribution reads plain output projections, not {type(projection).__name__}; load the model without quantisation")
