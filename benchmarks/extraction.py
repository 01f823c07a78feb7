"""Extraction against the plain ways, in one run: Hugging Face at batch 1, the TransformerLens bridge, ours.

    python -m benchmarks.extraction [--quick] [--device cuda] [--shape qwen3-8b]

A random model; sequences of log-normal length; residual stream after four layers, pooled to mean, last and sentence
ends. Ours reads traces from the disk, reads layer 0 on top, and writes its shards. Outputs are checked equal. Ends with
the bars and a non-zero exit when one is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks._common import bar, clock, matmul_peak_flops, paired_seconds, ratio
from benchmarks._random import PROMPT_TOKENS, SHAPES, VOCABULARY, forward_flops, make_model, random_trace
from tribunal.activations.extraction import Extractor, Pair
from tribunal.activations.plan import LabelledTraces
from tribunal.activations.store import tensor_name
from tribunal.core.records import Span, TraceLabel
from tribunal.core.storage import write_jsonl
from tribunal.models.bridge import BridgeReader
from tribunal.models.residual import hook_point

LAYERS = {"small": [4, 6, 7, 9], "qwen3-8b": [12, 18, 21, 24]}
POOLINGS = ["mean", "last", "sentence"]
SENTENCE_TOKENS = 16
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}  # of a row's norm; the GPU runs in bfloat16
BARS = {"HF, batch 1": 1.3, "bridge, filter": 1.7}
BOUND_BAR = 0.5
MEMORY_TRACES = (40, 160)


def make_pairs(count: int, vocabulary: int) -> list[Pair]:
    """Sequences of 50 to 600 tokens; the first has 600, so that memory is compared at the same longest one."""
    draw = random.Random(0)
    pairs = []
    for number in range(count):
        length = 600 if number == 0 else min(600, max(50, round(draw.lognormvariate(5.2, 0.5))))
        trace = random_trace(number, length, draw, vocabulary)
        ends = [*range(SENTENCE_TOKENS, trace.readable, SENTENCE_TOKENS), trace.readable]
        spans = [Span(start_char=0, end_char=0, start_token=s, end_token=e) for s, e in zip([0, *ends], ends)]
        label = TraceLabel(problem_id=trace.problem_id, sample=0, verdict="correct", answer="", gold="", stratum=None, sentences=spans)
        pairs.append((trace, label))
    return pairs


Pooled = dict[tuple[int, str], torch.Tensor]
States = Callable[[torch.Tensor], dict[int, torch.Tensor]]


def plain_pool(pairs: list[Pair], states: States, layers: list[int], device: str) -> Pooled:
    """What a script does: a forward per sequence, then pool every layer. ``states(ids)`` gives {layer: [L, D]}."""
    kept: dict[tuple[int, str], list[torch.Tensor]] = {(layer, pooling): [] for layer in layers for pooling in POOLINGS}
    with torch.no_grad():
        for trace, label in pairs:
            ids = torch.tensor([trace.prompt_ids + trace.completion_ids], device=device)
            ends = torch.tensor([PROMPT_TOKENS + span.end_token - 1 for span in label.sentences], device=device)
            for layer, hidden in states(ids).items():
                kept[layer, "mean"].append(hidden[PROMPT_TOKENS:].float().mean(0, keepdim=True).cpu())
                kept[layer, "last"].append(hidden[-1:].float().cpu())
                kept[layer, "sentence"].append(hidden[ends].float().cpu())
    return {name: torch.cat(rows) for name, rows in kept.items()}


def largest_difference(got: Pooled, expected: Pooled) -> float:
    return max(float(((got[name] - rows).norm(dim=1) / rows.norm(dim=1)).max()) for name, rows in expected.items())


class Ours:
    """Extract as the job does: traces from the disk, shard by shard, written and (for the check) read back."""

    def __init__(
        self, model: Any, pairs: list[Pair], layers: list[int], folder: Path, traces_per_shard: int, batch_tokens: int | None
    ) -> None:
        write_jsonl(folder / "traces.jsonl", [trace for trace, _ in pairs])
        write_jsonl(folder / "labels.jsonl", [label for _, label in pairs])
        self.folder, self.traces_per_shard = folder, traces_per_shard
        self.extractor = Extractor(model, layers=layers, poolings=POOLINGS, store_dtype="float32", batch_tokens=batch_tokens)
        self.files: list[Path] = []

    def __call__(self) -> None:
        traces = LabelledTraces(self.folder / "traces.jsonl", self.folder / "labels.jsonl", ["correct"])
        self.files = []
        for number, shard in enumerate(traces.shards(self.traces_per_shard)):
            self.files.append(self.folder / f"{number}.safetensors")
            self.extractor.write_shard(self.files[-1], traces.read(shard))

    def pooled(self, layers: list[int]) -> Pooled:
        parts = [load_file(file) for file in self.files]
        return {(layer, name): torch.cat([p[tensor_name(layer, name)] for p in parts]) for layer in layers for name in POOLINGS}


WAYS: dict[str, dict[str, Any]] = {
    "HF, batch 1": {},
    "bridge, no filter": {"filter": False, "stop": False},
    "bridge, filter": {"filter": True, "stop": False},
    "bridge, filter + stop": {"filter": True, "stop": True},
    "ours": {},
}


def make_way(name: str, args: argparse.Namespace, pairs: list[Pair], folder: Path) -> Callable[[], Pooled | None]:
    layers = LAYERS[args.shape]
    model: Any = make_model(args.shape, args.device)
    if name == "ours":
        ours = Ours(model, pairs, layers, folder, 256, args.batch_tokens)
        ours.extractor.self_check(pairs)
        return ours
    if name == "HF, batch 1":

        def states(ids: torch.Tensor) -> dict[int, torch.Tensor]:
            hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            return {layer: hidden[layer + 1][0] for layer in layers}
    else:
        bridge = BridgeReader(model, stop_early=False).bridge
        model = None  # the bridge has its own copy
        points = {layer: hook_point(layer) for layer in layers}
        options: dict[str, Any] = {"names_filter": list(points.values())} if WAYS[name]["filter"] else {}
        options |= {"stop_at_layer": max(layers) + 1} if WAYS[name]["stop"] else {}

        def states(ids: torch.Tensor) -> dict[int, torch.Tensor]:
            _, cache = bridge.run_with_cache(ids, **options)
            return {layer: cache[point][0] for layer, point in points.items()}

    plain_pool(pairs[:2], states, layers, args.device)  # warm up
    return lambda: plain_pool(pairs, states, layers, args.device)


def serve(name: str, args: argparse.Namespace, connection: Connection) -> None:
    """One way in a process of its own, as its user would run it: no other way's memory habits or caches."""
    torch.set_num_threads(args.threads)
    pairs = make_pairs(args.sequences, VOCABULARY[args.shape])
    with tempfile.TemporaryDirectory() as folder:
        way = make_way(name, args, pairs, Path(folder))
        result: Pooled | None = None
        connection.send("ready")
        while connection.recv() == "run":
            start = clock(args.device, wall=args.threads > 1)
            result = way()
            connection.send(clock(args.device, wall=args.threads > 1) - start)
        if isinstance(way, Ours):
            result = way.pooled(LAYERS[args.shape])
        assert result is not None
        connection.send({key: rows.numpy() for key, rows in result.items()})


def compare(args: argparse.Namespace) -> bool:
    shape, device, layers = SHAPES[args.shape], args.device, LAYERS[args.shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pairs = make_pairs(args.sequences, VOCABULARY[args.shape])
    tokens = sum(len(trace.prompt_ids) + trace.readable for trace, _ in pairs)
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in WAYS:
        ends[name], other = context.Pipe()
        context.Process(target=serve, args=(name, args, other), daemon=True).start()
        ends[name].recv()  # one after the other, so that loading takes the memory of one

    def ask(name: str) -> Callable[[], float]:
        def run() -> float:
            ends[name].send("run")
            return float(ends[name].recv())

        return run

    wall = args.threads > 1  # peak and runs by the same clock
    peak = matmul_peak_flops(device, dtype, wall=wall)
    seconds = paired_seconds({name: ask(name) for name in WAYS}, args.repeats)
    peak = max(peak, matmul_peak_flops(device, dtype, wall=wall))
    results: dict[str, Pooled] = {}
    for name, end in ends.items():
        end.send("stop")
        results[name] = {key: torch.from_numpy(rows) for key, rows in end.recv().items()}

    bound_s = forward_flops([len(trace.prompt_ids) + trace.readable for trace, _ in pairs], shape, max(layers) + 1) / peak
    clock_name = "CPU seconds" if device == "cpu" and not wall else "seconds"
    print(f"{args.shape}: {len(pairs)} sequences, {tokens} tokens, layers {layers} (ours 0 too), {'+'.join(POOLINGS)} in float32")
    print(f"{device}, {args.threads} threads, {args.repeats} repeats in turn, each way in its own process; medians")
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s; at that rate the flops that must be done take {bound_s:.1f} s")
    print(f"{'way':24}{clock_name:>12}{'tokens/s':>10}{'x ours':>8}{'range':>13}{'of bound':>10}{'differs by':>12}")
    good = True
    for name in WAYS:
        middle = median(seconds[name])
        difference = largest_difference(results[name], results["HF, batch 1"])
        good &= difference <= TOLERANCE[device]
        slower = [s / o for s, o in zip(seconds[name], seconds["ours"])]
        print(
            f"{name:24}{middle:12.1f}{tokens / middle:10.0f}{median(slower):8.2f}{min(slower):8.2f}-{max(slower):.2f}"
            f"{bound_s / middle:10.2f}{difference:12.1g}"
        )
    good = bar("outputs equal", float(good), 1.0)
    for name, least in BARS.items():
        good = bar(f"speed over {name}", ratio(seconds, name, "ours"), least) and good
    return bar("share of the flop bound", bound_s / median(seconds["ours"]), BOUND_BAR) and good


def memory_growth_mb(args: argparse.Namespace, count: int) -> float:
    """Peak memory over that of the loaded and warmed-up model, in a process of its own, MB."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--memory", str(count), "--device", args.device, "--shape", args.shape]
    command += ["--threads", str(args.threads)] + (["--batch-tokens", str(args.batch_tokens)] if args.batch_tokens else [])
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace) -> float:
    """MB. On a CPU the resident set is sampled, since the peak that the system keeps is that of making the model."""
    model = make_model(args.shape, args.device)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(model, make_pairs(args.memory, VOCABULARY[args.shape]), LAYERS[args.shape], Path(folder), 20, args.batch_tokens)
        ours.extractor.extract(make_pairs(1, VOCABULARY[args.shape]))
        if args.device == "cuda":
            before = torch.cuda.memory_allocated()
            ours()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        before, peak, done = _resident_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, _resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        ours()
        done.set()
        watcher.join()
        return (peak - before) / 1e6


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 sequences instead of 200")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, help="default: the extractor's")
    parser.add_argument("--memory", type=int, metavar="N", help="only print the memory that N traces need")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.sequences = args.sequences or (40 if args.quick else 200)
    if args.memory:
        print(json.dumps(measure_memory(args)))
        return
    good = compare(args)
    few, many = (memory_growth_mb(args, count) for count in MEMORY_TRACES)
    print(f"memory over the loaded model: {few:.0f} MB for {MEMORY_TRACES[0]} traces, {many:.0f} MB for {MEMORY_TRACES[1]}")
    good = bar("memory flat (room left to 1.2 x + 20 MB, MB)", 1.2 * few + 20 - many, 0.0) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
