"""Random models and traces that benchmarks measure with, and the flops that a forward pass over them needs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tribunal.core.records import Trace

SHAPES: dict[str, dict[str, Any]] = {
    "small": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4, head_dim=64),
    "qwen3-8b": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    ),
}
VOCABULARY = {"small": 8192, "qwen3-8b": 151_936}
PROMPT_TOKENS = 20


def make_model(shape: str, device: str) -> Qwen3ForCausalLM:
    """A Qwen3 of that shape with random weights, bfloat16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], vocab_size=VOCABULARY[shape], tie_word_embeddings=False))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def random_trace(number: int, length: int, draw: random.Random, vocabulary: int) -> Trace:
    """A trace of ``length`` random tokens, of which PROMPT_TOKENS are the prompt."""
    ids = [draw.randrange(vocabulary) for _ in range(length)]
    readable = length - PROMPT_TOKENS
    return Trace(
        problem_id=f"p{number}",
        sample=0,
        prompt_ids=ids[:PROMPT_TOKENS],
        completion_ids=ids[PROMPT_TOKENS:],
        logprobs=[0.0] * readable,
        finish_reason="stop",
        seed=0,
        readable=readable,
        thought="",
        thought_end=None,
        response="",
        model="random@0",
        template_sha256="0" * 64,
    )


def forward_flops(lengths: Iterable[int], shape: Mapping[str, Any], n_blocks: int) -> float:
    """Multiply-adds x 2 of the linear layers and of causal attention in so many blocks, for sequences of these lengths."""
    d, heads, kv, head = (shape[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    weights = d * head * (2 * heads + 2 * kv) + 3 * d * shape["intermediate_size"]
    return n_blocks * sum(2 * weights * length + 2 * heads * head * length**2 for length in lengths)
