"""Training an activation oracle: a plain script beside what train_oracle does, in one run; examples per second.

    python -m benchmarks.oracle_training [--quick] [--device cuda --shape qwen3-8b]

Traces of 300 to 600 random tokens, 16 questions about each (the published oracle asks 500), 1 to 16 consecutive vectors of one of
three layers in each question, prompts of 30 to 60 tokens, answers of 1 to 10. Both ways start from the same random model and LoRA
adapter (no dropout), see the same examples in every optimizer step and use AdamW; losses and the final adapter are checked equal.

- plain, as a published script does it: for each step one context pass per example, all of a step in one left-padded batch, ended
  after the deepest wanted block; vectors put in row by row; left-padded prompts in one batch; logits of all tokens.
- ours, from traces on the disk: one pass per trace into files of vectors, then the Trainer with its checkpoint.

Making model and adapter is not timed. The flops needed are, in multiply-adds x 2: one context pass per trace up to its last wanted
token and the deepest layer; per example token, forward and backward to the input of every frozen weight (2 + 2; the first block's
q, k and v need no backward) and of attention (1 + 2), and forward, weight and input gradient of LoRA (2 + 2 + 2); the head forward
and backward where an answer token is predicted. No padding, no recomputation. The share of the peak leaves saving out: a run of
thousands of steps hardly saves more often than this one. On a GPU the bar is that share, on a CPU the ratio. Exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from benchmarks._common import bar, clock, matmul_peak_flops, paired_seconds, ratio
from benchmarks._oracle import PAD, RANKS, Workload
from benchmarks._random import PROMPT_TOKENS, SHAPES, make_model
from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.core.storage import write_jsonl
from tribunal.core.work import Never
from tribunal.models.adapters import adapter_state, detach, new_adapter
from tribunal.models.describe import ModelShape
from tribunal.models.loading import LoadedModel
from tribunal.models.lora import LoraSettings
from tribunal.models.oracle_batches import Injection, Lesson
from tribunal.models.oracle_training import make_trainer
from tribunal.models.training import TrainerWork
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.vectors import VectorLayout, Vectors
from tribunal.traces.files import TraceFile

TRACES_PER_FILE = 256
LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 0.01, 1.0
SPEED_BAR = 3.0
PEAK_BAR = 0.375
"""Of the bf16 peak: 2.5 x what the published run reaches."""
PUBLISHED = "published: about 28 examples/s on one H100, about 15 % of its peak, contexts and gradient checkpointing included"
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 0.02}  # nats per answer token; the GPU runs in bfloat16
ADAPTER_TOLERANCE = {"cpu": 1e-3, "cuda": 0.15}  # of the adapter's whole change; vectors in another order make it 0.16

Adapter = dict[str, Tensor]


class Run(NamedTuple):
    """One way's training: its parts in seconds, and what came out."""

    contexts_s: float
    training_s: float
    saving_s: float
    losses: list[float]
    adapter: Adapter = {}  # these two are filled in by Bench.run
    peak_gb: float = math.nan

    @property
    def seconds(self) -> float:
        return self.working_s + self.saving_s

    @property
    def working_s(self) -> float:
        return self.contexts_s + self.training_s


class Bench:
    """The model and a folder to write in; runs a workload by either way."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        model: Any = make_model(args.shape, args.device)
        model.requires_grad_(False)
        shape = ModelShape(len(model.model.layers), model.config.hidden_size, model.config.vocab_size, None)
        nothing: Any = None  # no text, so neither tokenizer nor format
        self.loaded = LoadedModel(model, nothing, nothing, "random", "0", shape, torch.device(args.device), (0,))
        self.args, self.folder = args, folder

    def run(self, way: Callable[..., Run], workload: Workload) -> Run:
        """Make a fresh adapter and train it by ``way``, which times its parts."""
        detach(self.loaded.model)
        gc.collect()
        cuda = self.args.device == "cuda"
        rank = RANKS[self.args.shape]
        peft = new_adapter(self.loaded, LoraSettings(rank=rank, alpha=2 * rank, dropout=0.0), seed=0)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            write_jsonl(Path(folder) / "traces.jsonl", workload.traces)
            run = way(self.loaded, peft, workload, Path(folder))
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan
        adapter = {name: weight.detach().float().cpu().clone() for name, weight in adapter_state(peft).items()}
        detach(self.loaded.model)
        return run._replace(adapter=adapter, peak_gb=peak_gb)

    def start(self) -> Adapter:
        """The adapter before training."""
        return self.run(lambda *_: Run(0.0, 0.0, 0.0, []), Workload(self.args, 1)).adapter


# Ours ---------------------------------------------------------------------------------------------------------------------


class MadeLessons:
    """The workload's token ids with the vectors that were written."""

    def __init__(self, workload: Workload, vectors: Vectors) -> None:
        self.workload, self._vectors = workload, vectors

    def __len__(self) -> int:
        return len(self.workload.lessons)

    def __getitem__(self, number: int) -> Lesson:
        return self.workload.lessons[number]

    def vectors(self, number: int) -> Tensor:
        return self._vectors.of(self.workload.examples[number])


class Curve:
    """Metrics that keep the loss of each step, and when the last one came."""

    def __init__(self, device: str) -> None:
        self.device, self.losses, self.last_s = device, list[float](), 0.0

    def row(self, *, step: int, **numbers: float) -> None:
        self.losses.append(numbers["loss"])
        self.last_s = clock(self.device)


def ours(loaded: LoadedModel, peft: Any, workload: Workload, folder: Path) -> Run:
    args = workload.args
    began = clock(args.device)
    source = ActivationSource(loaded, TraceFile(folder / "traces.jsonl"), None)
    layout = VectorLayout(workload.examples, TRACES_PER_FILE)
    files = [folder / f"{number}.safetensors" for number in range(len(layout.files))]
    for number, path in enumerate(files):
        layout.write(number, source, path, loaded.model.dtype)
    read = clock(args.device)
    curve = Curve(args.device)
    make = partial(
        make_trainer,
        peft=peft,
        lessons=MadeLessons(workload, Vectors(layout, files)),
        injection=Injection(),
        pad_id=PAD,
        steps=workload.steps,
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
        learning_rate=LEARNING_RATE,
        schedule="linear",
        warmup=WARMUP,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        bf16=args.device == "cuda",
        gradient_checkpointing=args.gradient_checkpointing,
        seed=0,
        validate=None,
        validate_at=frozenset(),
        keep_at=frozenset(),
    )
    work = TrainerWork(make, CheckpointStore(folder / "states", owner="benchmark"), folder / "scratch", metrics=curve)
    assert work.run(Never())
    return Run(read - began, curve.last_s - read, clock(args.device) - curve.last_s, curve.losses)


# Plain --------------------------------------------------------------------------------------------------------------------


class Deepest(Exception):
    """Ends the context pass."""


def plain(loaded: LoadedModel, peft: Any, workload: Workload, folder: Path) -> Run:
    args, steps = workload.args, workload.steps
    blocks = peft.get_base_model().model.layers
    weights = [weight for weight in peft.parameters() if weight.requires_grad]
    began, contexts_s = clock(args.device), 0.0
    if args.gradient_checkpointing:
        peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    losses = []
    peft.train()
    for step in range(steps):
        numbers = workload.step(step)
        start = clock(args.device)
        vectors = read_contexts(peft, blocks, workload, numbers)
        contexts_s += clock(args.device) - start
        lessons = [workload.lessons[number] for number in numbers]
        ids_BL, mask_BL, padding = left_padded([x.prompt_ids + x.answer_ids for x in lessons], args.device)
        labels_BL = ids_BL.clone()
        for row, lesson in enumerate(lessons):
            labels_BL[row, : padding[row] + len(lesson.prompt_ids)] = -100
        places = [[pad + position for position in lesson.positions] for pad, lesson in zip(padding, lessons)]
        hook = blocks[1].register_forward_hook(injection_hook(vectors, places))
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = peft(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL, use_cache=False).loss
        loss.backward()
        hook.remove()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = clock(args.device)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    if args.gradient_checkpointing:
        peft.gradient_checkpointing_disable()
    return Run(contexts_s, trained - began - contexts_s, clock(args.device) - trained, losses)


def left_padded(rows: list[list[int]], device: str) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and mask [B, L], and how much stands before each row."""
    padding = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([[PAD] * pad + row for pad, row in zip(padding, rows)], device=device)
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)], device=device)
    return ids, mask, padding


@torch.no_grad()
def read_contexts(peft: Any, blocks: Any, workload: Workload, numbers: list[int]) -> list[Tensor]:
    """The vectors [K, D] of these examples: each one's trace up to its last token, adapters off, one batch."""
    examples = [workload.examples[number] for number in numbers]
    traces = [workload.traces[number // workload.args.questions_per_trace] for number in numbers]
    contexts = [trace.prompt_ids + trace.completion_ids[: example.tokens[-1] + 1] for trace, example in zip(traces, examples)]
    ids_BL, mask_BL, padding = left_padded(contexts, workload.args.device)
    wanted = sorted({example.layers[0] for example in examples})
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output
            if layer == wanted[-1]:
                raise Deepest

        return hook

    hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in wanted]
    peft.eval()
    with peft.disable_adapter(), contextlib.suppress(Deepest):
        peft(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
    peft.train()
    for handle in hooks:
        handle.remove()
    places = [[pad + PROMPT_TOKENS + token for token in example.tokens] for pad, example in zip(padding, examples)]
    return [seen[example.layers[0]][row, places[row]] for row, example in enumerate(examples)]


def injection_hook(vectors: list[Tensor], places: list[list[int]]) -> Callable[..., Any]:
    """Adds to each row's states at its places its vectors, at the states' own length."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden_BLD = output[0] if isinstance(output, tuple) else output
        for row, (vectors_KD, at) in enumerate(zip(vectors, places)):
            states_KD = hidden_BLD[row, at]
            unit_KD = torch.nn.functional.normalize(vectors_KD.float(), dim=-1)
            steer_KD = unit_KD * states_KD.float().norm(dim=-1, keepdim=True)
            hidden_BLD[row, at] = states_KD + steer_KD.detach().to(states_KD.dtype)
        return output

    return hook


# Comparison ---------------------------------------------------------------------------------------------------------------


WAYS = {"plain": plain, "ours": ours}


def compare(args: argparse.Namespace, folder: Path) -> bool:
    bench, workload = Bench(args, folder), Workload(args, args.steps)
    start = bench.start()
    small = argparse.Namespace(**{**vars(args), "batch_size": args.batch_size if args.device == "cuda" else 2})
    for way in WAYS.values():
        bench.run(way, Workload(small, 2 if args.device == "cuda" else 1))  # warm up
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    peak = matmul_peak_flops(args.device, dtype)
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            runs[name].append(bench.run(WAYS[name], workload))
            return runs[name][-1].seconds

        return run

    seconds = paired_seconds({name: timed(name) for name in WAYS}, args.repeats)
    peak = max(peak, matmul_peak_flops(args.device, dtype))
    return report(args, workload, runs, seconds, peak, start)


def report(
    args: argparse.Namespace,
    workload: Workload,
    runs: dict[str, list[Run]],
    seconds: dict[str, list[float]],
    peak: float,
    start: Adapter,
) -> bool:
    """Print the table and the bars; True when all are met."""
    examples, tokens = len(workload.examples), sum(lesson.length for lesson in workload.lessons)
    contexts_s, training_s = (flops / peak for flops in workload.flops())
    cuda = args.device == "cuda"
    share = {name: (contexts_s + training_s) / median(run.working_s for run in done) for name, done in runs.items()}
    print(
        f"{args.shape}: {examples} examples of {tokens / examples:.0f} tokens in {workload.steps} steps, LoRA rank {RANKS[args.shape]}; "
        f"{len(workload.traces)} traces, {args.questions_per_trace} questions each"
    )
    print(
        f"{args.device}, {torch.get_num_threads()} threads, {args.repeats} repeats in turn, medians; ours in passes of at most "
        f"{args.batch_tokens} tokens{', gradient checkpointing' if args.gradient_checkpointing else ''}"
    )
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s: at that rate the flops needed take {contexts_s:.2f} s (contexts) + {training_s:.2f} s")
    print(f"{'way':8}{'seconds':>9}{'examples/s':>12}{'x ours':>8}{'range':>13}{'contexts':>10}{'training':>10}{'saving':>8}{'of peak':>9}")
    for name, done in runs.items():
        middle = median(seconds[name])
        slower = [s / o for s, o in zip(seconds[name], seconds["ours"])]
        parts = [median(getattr(run, part) for run in done) for part in ("contexts_s", "training_s", "saving_s")]
        print(
            f"{name:8}{middle:9.2f}{examples / middle:12.2f}{median(slower):8.2f}{min(slower):8.2f}-{max(slower):.2f}"
            f"{parts[0]:10.2f}{parts[1]:10.2f}{parts[2]:8.2f}{share[name]:9.2f}"
        )
    if cuda:
        print(
            "peak memory, the model's included:", ", ".join(f"{name} {max(r.peak_gb for r in done):.1f} GB" for name, done in runs.items())
        )
        print(PUBLISHED)
    training = {name: [run.training_s for run in done] for name, done in runs.items()}
    print(
        f"training alone, contexts and saving left out on both sides: {ratio(training, 'plain', 'ours'):.2f} x, "
        f"ours at {training_s / median(training['ours']):.2f} of the peak"
    )
    ours, plain = runs["ours"][0], runs["plain"][0]
    print(f"loss of the first and the last step: {plain.losses[0]:.4f}, {plain.losses[-1]:.4f} nats per answer token")
    losses = max(abs(a - b) for a, b in zip(ours.losses, plain.losses, strict=True))
    good = at_most("largest difference of a step's loss, nats", losses, LOSS_TOLERANCE[args.device])
    adapters = distance(ours.adapter, plain.adapter) / distance(plain.adapter, start)
    good = at_most("difference of the trained adapters, of their change", adapters, ADAPTER_TOLERANCE[args.device]) and good
    if cuda:
        return bar("share of the bf16 peak", share["ours"], PEAK_BAR) and good
    return bar("speed over plain", ratio(seconds, "plain", "ours"), SPEED_BAR) and good


def distance(a: Adapter, b: Adapter) -> float:
    """Euclidean, of all weights together."""
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))


def at_most(name: str, value: float, most: float) -> bool:
    print(f"{'PASS' if value <= most else 'FAIL'}  {name}: {value:.2g} (at most {most:g})")
    return value <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 steps, one repeat")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--steps", type=int, help="default: 6 on a CPU, 60 on a GPU")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="examples in an optimizer step")
    parser.add_argument("--batch-tokens", type=int, help="ours: most tokens in a pass, padding included; default: 512 on a CPU, else 16384")
    parser.add_argument("--questions-per-trace", type=int, default=16)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both ways")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats = args.steps or 2, 1
    args.steps = args.steps or (6 if args.device == "cpu" else 60)
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: at least 2, since the first step of a warm-up has the learning rate 0")
    args.batch_tokens = args.batch_tokens or (512 if args.device == "cpu" else 16_384)
    if args.device == "cpu":
        torch.set_num_threads(1)  # seconds are the process's
    with tempfile.TemporaryDirectory() as folder:
        return 0 if compare(args, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
