"""What a monitor costs while a model generates: sampling alone and sampling watched, in turns, in one run.

    python -m benchmarks.monitor [--quick] [--device cuda --shape qwen3-8b]

One row is streamed with everything a reader of the stream gets (text, sentences, score of each token), many rows are watched
as a job would. The sampled tokens are checked equal. Overheads are medians over repeats that take turns, of CPU seconds on a
CPU. Exits 1 when the bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks._common import paired
from benchmarks.generation import SHAPES, random_model
from tribunal.models import draws
from tribunal.models.formats import PromptFormat
from tribunal.models.generation import Request, Sampler
from tribunal.models.loading import LoadedModel, ModelShape
from tribunal.probes.direction import Direction, Directions, Model, Place, hook_point, vector_norm
from tribunal.probes.monitor import CHECKED, Monitor

BAR = 0.05
"""Largest share of the generation's time that watching it may add."""
PROMPT = 40


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``size`` words; one in twelve ends a sentence, one in sixty a line."""
    names = [f" word{i}" + ("." if i % 12 == 0 else "") + ("\n" if i % 60 == 0 else "") for i in range(size)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def loaded_model(shape: str, device: str) -> LoadedModel:
    """A random model with a prompt format, as an experiment's model comes."""
    model, sizes = random_model(SHAPES[shape], device), SHAPES[shape]
    tokenizer = words(sizes.vocab)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        format=PromptFormat(tokenizer, kind="pattern"),
        name="random",
        revision="none",
        shape=ModelShape(sizes.layers, sizes.width, sizes.vocab, 4096),
        device=torch.device(device),
        eos_ids=(),
    )


def monitor_of(loaded: LoadedModel) -> Monitor:
    """A random direction in the middle layer, followed by its running mean."""
    vector = torch.randn(loaded.d_model, generator=torch.Generator().manual_seed(2)).double().tolist()
    layer = loaded.n_layers // 2
    direction = Direction(
        layer=layer, pooling="mean", hook_point=hook_point(layer), vector=vector, bias=0.0, norm=vector_norm(vector), metrics={},
        training_set_sha256=None,
    )  # fmt: skip
    directions = Directions(
        model=Model(name=None, revision=None, d_model=loaded.d_model, n_layers=loaded.n_layers),
        dataset={},
        directions=[direction],
        best=Place(layer=layer, pooling="mean"),
    )
    return Monitor(directions, allow=CHECKED)


def compare(title: str, alone: Callable[[], Any], watched: Callable[[], Any], tokens: int, repeats: int, device: str) -> bool:
    """Time both in turns, check that they sample the same, print the overhead; True when the bar is met."""
    same = alone() == watched()  # warms up as well
    seconds = paired({"alone": alone, "watched": watched}, repeats, device)
    overheads = sorted(w / a - 1 for a, w in zip(seconds["alone"], seconds["watched"]))
    overhead, met = median(overheads), median(overheads) < BAR
    print(f"{title}: {tokens} tokens, {repeats} repeats, {device}, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        print(f"  {name:8} {median(values):7.2f} s  {1000 * median(values) / tokens:6.2f} ms per token")
    span = f"(repeats {overheads[0]:+.1%} to {overheads[-1]:+.1%})"
    print(f"  watching adds {overhead:+.1%} {span}; bar < {BAR:.0%}: {'met' if met else 'MISSED'}")
    if not same:
        print("  THE SAMPLED TOKENS DIFFER")
    return met and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the random model; small is 12 layers x 512")
    parser.add_argument("--tokens", type=int, default=300, help="new tokens of each row")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="60 tokens, 4 rows, 3 repeats")
    args = parser.parse_args()
    tokens, rows, repeats = (60, 4, 3) if args.quick else (args.tokens, args.rows, args.repeats)
    loaded = loaded_model(args.shape, args.device)
    monitor = monitor_of(loaded)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, loaded.shape.vocab_size, (PROMPT,), generator=generator).tolist() for _ in range(rows)]

    def requests(count: int) -> list[Request]:
        # named as the stream names a prompt of ids, so that both draw the same
        names = [",".join(map(str, ids)) for ids in prompts[:count]]
        return [Request(name, ids, tokens, draws.stream(0, name, 0)) for name, ids in zip(names, prompts)]

    def sampled(count: int) -> dict[str, list[int]]:
        sampler = Sampler(loaded.model, eos_ids=(), slots=count)
        return {done.key: done.tokens for step in sampler.run(requests(count)) for done in step}

    def streamed() -> dict[str, list[int]]:
        steps = list(monitor.stream(loaded, prompts[0], max_new_tokens=tokens))
        assert sum(len(step.sentences) for step in steps) >= 1
        return {requests(1)[0].key: [step.token for step in steps]}

    def watched() -> dict[str, list[int]]:
        out: dict[str, list[int]] = {request.key: [] for request in requests(rows)}
        for step in monitor.watch(Sampler(loaded.model, eos_ids=(), slots=rows), requests(rows)):
            for one in step:
                out[one.token.key].append(one.token.token)
        return out

    sizes = SHAPES[args.shape]
    title = f"random Qwen3 ({sizes.layers} layers x {sizes.width})"
    met = compare(f"{title}, one row streamed with text and sentences", lambda: sampled(1), streamed, tokens, repeats, args.device)
    met &= compare(f"{title}, {rows} rows watched", lambda: sampled(rows), watched, tokens * rows, repeats, args.device)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
