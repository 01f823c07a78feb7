"""A small finished experiment made in code, whose signal and confounds are known, and its probes trained outside any job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tribunal.activations.store import Meta, Piece, ShardFile, ShardWriter
from tribunal.core.records import Problem, Span, Trace, TraceLabel
from tribunal.core.storage import sha256_file, write_json, write_jsonl
from tribunal.probes import training as module

D_MODEL = 12


@dataclass
class World:
    """Folders as the three jobs leave them, and the truth behind them."""

    root: Path
    labels: np.ndarray
    problems: list[str]

    @property
    def traces(self) -> Path:
        return self.root / "generate_traces"

    @property
    def labelled(self) -> Path:
        return self.root / "label_traces"

    @property
    def activations(self) -> Path:
        return self.root / "extract_activations"

    def settings(self, **changes) -> dict:
        usual = {
            "kinds": ["logistic", "ridge", "diff_of_means"],
            "folds": 4,
            "c": [0.01, 1.0],
            "min_per_class": 20,
            "truncated": "leave_out",
        }
        return {**usual, "rows_per_trace": 8, "permutations": 40, "random_directions": 10, "bootstrap": 200, **changes}


def make_world(
    root: Path,
    *,
    problems: int = 60,
    samples: int = 4,
    signal: str = "activations",
    seed: int = 0,
    logprobs: bool = True,
    poolings: Sequence[str] = ("prompt_end", "mean", "sentence"),
) -> World:
    """Write an experiment.

    Args:
        signal: what tells right from wrong. "activations": layer 1's mean and sentences; "length": the number of tokens
            alone, which layer 1 carries as well; "none": nothing.
    """
    rng = np.random.default_rng(seed)
    width = {pooling: {"sentence": 3, "think_end": 0}.get(pooling, 1) for pooling in poolings}
    ids = [f"p{i}" for i in range(problems)]
    difficulty = rng.standard_normal(problems)
    traces, labels, values, lengths, verdicts = [], [], [], [], []
    for p, problem in enumerate(ids):
        for sample in range(samples):
            right = int(rng.random() < 1 / (1 + np.exp(-difficulty[p])))
            length = int(20 + (3 * right if signal == "length" else 0) + rng.integers(0, 6))
            verdict = "truncated" if (p, sample) == (0, 0) else ("correct" if right else "incorrect")
            text = " ".join(str(n) for n in rng.integers(0, 50, 6))
            traces.append(
                Trace(
                    problem_id=problem, sample=sample, prompt_ids=[1, 2], completion_ids=[5] * (length + 1), readable=length,
                    logprobs=(-rng.random(length + 1)).tolist() if logprobs else [], finish_reason="stop", seed=0, thought=text,
                    thought_end=length - 2, response="so 7", model="tiny@none", template_sha256="0" * 64,
                )
            )  # fmt: skip
            spans = [Span(start_char=i, end_char=i + 1, start_token=i, end_token=i + 1) for i in range(3)]
            labels.append(
                TraceLabel(
                    problem_id=problem, sample=sample, verdict=verdict, answer="7", gold="7", stratum=f"{2 + p % 2} digits", sentences=spans
                )
            )
            values.append(right)
            lengths.append(length)
            verdicts.append(verdict)
    world = World(root, np.array(values), [trace.problem_id for trace in traces])
    for folder in (world.traces, world.labelled, world.activations):
        folder.mkdir(parents=True)
    questions = [
        Problem(id=i, question=f"what is {n}?", answer="7", stratum=f"{2 + n % 2} digits", dataset="made", revision="r")
        for n, i in enumerate(ids)
    ]
    write_jsonl(world.traces / "problems.jsonl", questions)
    write_jsonl(world.traces / "traces.jsonl", traces)
    write_jsonl(world.labelled / "labels.jsonl", labels)

    path = world.activations / "acts-00000.safetensors"
    index = []
    with ShardWriter(path, layers=[0, 1], rows={k: v * len(traces) for k, v in width.items()}, d_model=D_MODEL, dtype="float32") as writer:
        for pooling, rows in width.items():
            keys = [(trace.problem_id, trace.sample, position) for trace in traces for position in range(rows)]
            for row, (problem, sample, position) in enumerate(keys):
                place = {"shard": 0, "pooling": pooling, "row": row, "problem_id": problem, "sample": sample, "position": position}
                index.append({**place, "start_token": position, "end_token": position + 1})
            for layer in (0, 1):
                acts = rng.standard_normal((len(traces), rows, D_MODEL)) + 2
                if pooling == "prompt_end":
                    acts = np.repeat(rng.standard_normal((problems, 1, D_MODEL)), samples, axis=0)
                elif layer == 1 and signal == "activations":
                    acts[:, :, 3] += 1.5 * np.array(values)[:, None]
                elif layer == 1 and signal == "length":
                    acts[:, :, 3] = (np.array(lengths)[:, None] - 24) / 4
                flat = torch.tensor(acts.reshape(-1, D_MODEL), dtype=torch.float32)
                writer.put([Piece(layer, pooling, 0, flat)])
    write_jsonl(world.activations / "index.jsonl", index)
    meta = Meta(
        model={"name": "tiny", "revision": None, "d_model": D_MODEL, "n_layers": 2}, layers=[0, 1],
        hook_points=["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"], poolings=list(width), d_model=D_MODEL, dtype="float32",
        backend="hooks", verdicts=["correct", "incorrect"], template_sha256=["0" * 64], traces=len(traces), absent={},
        shards=[ShardFile(file=path.name, sha256=sha256_file(path), rows={k: v * len(traces) for k, v in width.items()})],
    )  # fmt: skip
    write_json(world.activations / "activations.json", meta.model_dump(mode="json"))
    return world


def train(world, out: Path, **changes):
    """Fit every unit and publish into ``out``; returns the evaluation."""
    training = module.ProbeTraining(
        traces=world.traces, labels=world.labelled, activations=world.activations, settings=world.settings(**changes), seed=0
    )
    parts = out.parent / f"{out.name}-parts"
    parts.mkdir()
    out.mkdir()
    records = {f"control/{name}": training.fit_control(name, parts / f"{name}.safetensors") for name in training.controls}
    for pooling in training.poolings:
        for layer in training.activations.layers:
            records[f"layer_{layer}/{pooling}"] = training.fit_cell(layer, pooling, parts / f"{layer}.{pooling}.safetensors")
    module.publish(
        training, out, records=records, parts=parts, experiment="made", dataset={"split": "test"}, dtype="float32", planted=False
    )
    return module.evaluate(training, records, parts)
