"""Sampling speed side by side: one by one, static batches, and the engine of generate_traces, in one run.

    python benchmarks/generation.py [--quick] [--device cuda --shape qwen3-8b]

The lengths are forced and skewed (log-normal, 8 to 400 tokens): what makes static batches wait is the longest row.
Greedy outputs are checked equal. Ratios are medians over repeats that take turns. The bound is the least number of model
passes (the longest request's, or all tokens over the slots) at the measured speed of bare passes, taken as linear in the
number of rows; prefill is not in it. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from tribunal.models import draws
from tribunal.models.generation import Request, Sampler

BAR_RANDOM = 2.5
"""x one by one on the 12-layer random model."""
BAR_BUILTIN = 5.0
"""x one by one on the built-in reasoner."""


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int


SHAPES = {
    "small": Shape(12, 512, 8, 4, 64, 1536, 8192),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151_936),
}


def random_model(shape: Shape, device: str) -> Any:
    """A Qwen3 of that shape with random weights."""
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def skewed_requests(count: int, vocab: int, longest: int) -> list[Request]:
    """Prompts of 20-60 tokens; lengths log-normal around 40, cut to 8..``longest``."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randn(count, generator=generator).mul(0.9).add(math.log(40)).exp().clamp(8, longest).int().tolist()
    lengths[count // 3] = longest  # the tail is there in every draw
    prompts = [torch.randint(5, vocab, (int(torch.randint(20, 61, (1,), generator=generator)),), generator=generator) for _ in lengths]
    return [Request(f"{i}/0", p.tolist(), n, draws.stream(0, str(i), 0)) for i, (p, n) in enumerate(zip(prompts, lengths))]


Output = dict[str, list[int]]


@torch.no_grad()
def one_by_one(model: Any, requests: Sequence[Request]) -> Output:
    return {key: tokens for request in requests for key, tokens in static(model, [request], 1).items()}


@torch.no_grad()
def static(model: Any, requests: Sequence[Request], size: int) -> Output:
    """``generate`` over left-padded batches in arrival order; every batch runs for its longest row."""
    out = {}
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        width = max(len(request.prompt_ids) for request in batch)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + r.prompt_ids for r in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch], device=model.device)
        most = max(request.max_new_tokens for request in batch)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for row, request in zip(made[:, width:].tolist(), batch):
            out[request.key] = row[: request.max_new_tokens]
    return out


def ours(model: Any, requests: Sequence[Request], slots: int) -> Output:
    sampler = Sampler(model, eos_ids=[], slots=slots, temperature=0)
    return {done.key: done.tokens for step in sampler.run(requests) for done in step}


@torch.no_grad()
def pass_seconds(model: Any, rows: int, context: int = 80) -> float:
    """Median seconds of a bare decoding pass of ``rows`` rows over an unpadded cache."""
    ids = torch.randint(5, model.config.vocab_size, (rows, context), device=model.device)
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(12):
        began = now(model)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        times.append(now(model) - began)
    return statistics.median(times)


def now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(title: str, model: Any, requests: list[Request], slots: int, repeats: int, bar: float) -> bool:
    """Time the ways in turns, print the table; True when the bar is met and the outputs agree."""
    tokens = sum(request.max_new_tokens for request in requests)
    ways: dict[str, Callable[[], Output]] = {
        "generate, one by one": lambda: one_by_one(model, requests),
        f"generate, one batch of {len(requests)}": lambda: static(model, requests, len(requests)),
        "generate, batches of 8": lambda: static(model, requests, 8),
        f"tribunal, {slots} slots": lambda: ours(model, requests, slots),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Output] = {}
    one_by_one(model, requests[:1])  # warm up
    ours(model, requests[:2], slots)
    for _ in range(repeats):
        for name, way in ways.items():
            began = now(model)
            outputs[name] = way()
            times[name].append(now(model) - began)
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr)
    names = list(ways)
    seconds = {name: statistics.median(times[name]) for name in names}
    ratios = {name: statistics.median(a / b for a, b in zip(times[names[0]], times[name])) for name in names}
    passes = max(max(request.max_new_tokens for request in requests), math.ceil(tokens / slots))
    single, full = pass_seconds(model, 1), pass_seconds(model, slots)
    bound = passes * single + (tokens - passes) * (full - single) / max(slots - 1, 1)
    print(f"\n{title}: {len(requests)} prompts, {tokens} new tokens, {repeats} repeats, {model.device}, {torch.get_num_threads()} threads")
    print(f"{'way':34}{'seconds':>9}{'tokens/s':>10}{'x one by one':>14}{'of the bound':>14}{'same tokens':>13}")
    agree = {name: sum(outputs[name][r.key] == outputs[names[0]][r.key] for r in requests) / len(requests) for name in names}
    for name in names:
        s = seconds[name]
        print(f"{name:34}{s:9.2f}{tokens / s:10.0f}{ratios[name]:14.2f}{bound / s:14.2f}{agree[name]:13.0%}")
    met, same = ratios[names[-1]] >= bar, agree[names[-1]] >= 0.97
    print(f"bar >= {bar} x one by one: {'met' if met else 'MISSED'}; bound: {passes} passes, {bound:.2f} s")
    if not same:
        print("OUTPUTS DIFFER by more than rounding can explain (a greedy tie may turn one row in many)")
    return met and same


def builtin(device: str, count: int, repeats: int) -> bool:
    """The built-in reasoner on its own problems, sampled lengths as they come (greedy, forced to the trace's length)."""
    from tribunal.core.config import ModelConfig
    from tribunal.datasets.addition import Dataset
    from tribunal.models.loading import load_model

    loaded = load_model(ModelConfig(name="builtin:addition", dtype="float32", device=device))
    problems = Dataset(name="addition", per_digits=-(-count // 3)).problems()[:count]
    prompts = [loaded.format.prompt_ids(problem) for problem in problems]
    requests = [Request(f"{i}/0", ids, 100, draws.stream(0, str(i), 0)) for i, ids in enumerate(prompts)]
    sampler = Sampler(loaded.model, eos_ids=loaded.eos_ids, slots=64)
    lengths = {done.key: len(done.tokens) for step in sampler.run(requests) for done in step}
    forced = [request._replace(max_new_tokens=lengths[request.key]) for request in requests]
    return compare("built-in reasoner (3 layers x 128)", loaded.model, forced, min(64, count), repeats, BAR_BUILTIN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the random model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="16 prompts, at most 120 tokens, one repeat")
    args = parser.parse_args()
    count, longest, repeats = (16, 120, 1) if args.quick else (args.prompts, 400, args.repeats)
    shape = SHAPES[args.shape]
    model = random_model(shape, args.device)
    title = f"random Qwen3 ({shape.layers} layers x {shape.width})"
    met = compare(title, model, skewed_requests(count, shape.vocab, longest), min(args.slots, count), repeats, BAR_RANDOM)
    del model
    met &= builtin(args.device, 32 if args.quick else 192, repeats)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
