"""Which heads and MLPs write the probe's signal, and what is lost without them.

The signal of a trace is the logit of the probe that never saw its problem. It is the sum of what each component writes
along the probe's direction (``tribunal.models.components``), so the gap between right and wrong traces is a sum over
components, too. Components are ranked by their part of the gap on one half of the problems. On the other half the parts
are measured, and the top ones are replaced by their means beside random sets of as many: what happens to the signal on
the same texts, and to the answers when the model writes anew.

Shapes: N traces, C components, K directions (folds, then random ones), L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tribunal.activations.batches import token_budget
from tribunal.activations.poolings import spans
from tribunal.core.errors import ConfigError, CorruptError, DataError, LabelError
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.storage import iter_jsonl, read_jsonl, sha256_file, write_file
from tribunal.core.work import Checkpoints, Journal, Json, Stop
from tribunal.models import draws
from tribunal.models.components import ABLATABLE, Component, Components, Means, Writes, writers
from tribunal.models.generation import Request, Sampler
from tribunal.models.loading import LoadedModel
from tribunal.probes.held_out import HeldOut
from tribunal.probes.training import evenly_spaced
from tribunal.traces.files import TraceFile
from tribunal.traces.labels import verdict_of
from tribunal.traces.sampling import Attempt, make_trace

Floats = NDArray[np.float64]
Pair = tuple[Trace, TraceLabel]
NONE, TOP = "none", "top"
SHARD = 64
"""Traces in one unit of reading."""
DISTINCT_TRIES = 50
"""Draws for a random set that was not drawn yet; a small model may not have so many."""


class Settings(NamedTuple):
    traces: int
    top: int
    random_sets: int
    random_directions: int
    problems: int
    samples: int
    batch_tokens: int | None
    slots: int


class Item(NamedTuple):
    """One piece of the plan: traces to read, or attempts to sample together, under one condition."""

    kind: str  # "writes" | "signal" | "answers"
    condition: str
    number: int
    attempts: tuple[Attempt, ...] = ()

    @property
    def keys(self) -> list[str]:
        if self.kind == "answers":
            return [f"answers/{self.condition}/{attempt.key}" for attempt in self.attempts]
        return [f"{self.kind}/{self.condition}/{self.number:05d}"]


def random_conditions(settings: Settings) -> list[str]:
    return [f"random-{number:02d}" for number in range(settings.random_sets)]


class Inputs:
    """What the attribution reads, chosen and put in order; needs no model.

    Args:
        pairs: labelled traces that the probe was measured on, in a fixed order.
        problems: by id, for asking again.
        rows_per_trace: of train_probes: a trace's signal is the mean over as many rows as the probe was measured on.
    Raises:
        LabelError: a half has no right or no wrong trace.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        problems: Mapping[str, Problem],
        held_out: HeldOut,
        settings: Settings,
        seed: int,
        *,
        rows_per_trace: int,
    ) -> None:
        self.held_out, self.settings, self.seed, self.rows_per_trace = held_out, settings, seed, rows_per_trace
        self.pairs = list(pairs)
        self.labels = np.array([held_out.labels[trace.problem_id, trace.sample] for trace, _ in self.pairs])
        self.ranking = np.array([draws.order_key(seed, f"half {trace.problem_id}")[0] % 2 == 0 for trace, _ in self.pairs], dtype=bool)
        for half, name in ((self.ranking, "ranks the components"), (~self.ranking, "measures them")):
            if len(set(self.labels[half])) < 2:
                raise LabelError(
                    f"attribute_direction: the half of the problems that {name} has no {'wrong' if self.labels[half].any() else 'right'} "
                    f"trace among {settings.traces}; raise attribute_direction.traces, or sample more problems"
                )
        ids = dict.fromkeys(trace.problem_id for (trace, _), ranks in zip(self.pairs, self.ranking) if not ranks)
        self.attempts = [Attempt(problems[i], sample) for i in list(ids)[: settings.problems] for sample in range(settings.samples)]

    @property
    def problem_ids(self) -> list[str]:
        return [trace.problem_id for trace, _ in self.pairs]

    @cached_property
    def folds(self) -> NDArray[np.int64]:
        """Each trace's fold, [N]: the number of its direction."""
        return np.array([self.held_out.fold_of(problem) for problem in self.problem_ids])

    @cached_property
    def directions(self) -> torch.Tensor:
        """[K, D]: the direction of each fold, then random ones of the same length."""
        by_fold = {self.held_out.fold_of(problem): self.held_out.direction_of(problem) for problem in self.problem_ids}
        width = len(next(iter(by_fold.values())).vector)
        ours = np.zeros((max(by_fold) + 1, width))
        for fold, direction in by_fold.items():
            ours[fold] = direction.vector
        length = np.mean([direction.norm for direction in by_fold.values()])
        count = self.settings.random_directions
        random = np.random.default_rng([self.seed, count]).standard_normal((count, width))
        random *= length / np.linalg.norm(random, axis=1, keepdims=True)
        return torch.tensor(np.concatenate([ours, random]), dtype=torch.float32)

    @cached_property
    def biases(self) -> Floats:
        """Each trace's bias, [N]."""
        return np.array([self.held_out.direction_of(problem).bias for problem in self.problem_ids])

    def plan(self) -> list[Item]:
        """Reading first: what is ablated follows from it."""
        shards = -(-len(self.pairs) // SHARD)
        conditions = [NONE, TOP, *random_conditions(self.settings)]
        waves = [tuple(self.attempts[start : start + self._wave]) for start in range(0, len(self.attempts), self._wave)]
        return [
            *(Item("writes", "all", number) for number in range(shards)),
            *(Item("signal", condition, number) for condition in conditions[1:] for number in range(shards)),
            *(Item("answers", condition, number, wave) for condition in conditions for number, wave in enumerate(waves)),
        ]

    @property
    def _wave(self) -> int:
        return 4 * self.settings.slots

    def shard(self, number: int) -> slice:
        return slice(number * SHARD, (number + 1) * SHARD)


class Gathered(NamedTuple):
    """All that was read of the traces, those of given-up units left out."""

    rows_N: NDArray[np.int64]  # numbers of the traces in ``Inputs.pairs``
    parts_NC: Floats  # along each trace's own direction
    random_NCR: Floats
    signal_N: Floats  # the stream's projection, without the bias
    means: Means


def gather(inputs: Inputs, records: Journal, folder: Path) -> Gathered:
    """Raises CorruptError where a part differs from its record."""
    rows, own, random, signal = [], [], [], []
    heads, mlps, tokens = torch.zeros(()), torch.zeros(()), 0
    for item in inputs.plan():
        if item.kind != "writes" or item.keys[0] not in records:
            continue
        record = records[item.keys[0]]
        path = folder / record["file"]
        if not path.exists() or sha256_file(path) != record["sha256"]:
            raise CorruptError(f"{path}: missing or damaged; remove the folder {folder.parent} and run attribute_direction again")
        part = load_file(path)
        numbers = np.arange(len(inputs.pairs))[inputs.shard(item.number)]
        values = part["contributions"].double().numpy()
        n_folds = values.shape[2] - inputs.settings.random_directions
        rows.append(numbers)
        own.append(values[np.arange(len(numbers)), :, inputs.folds[numbers]])
        random.append(values[:, :, n_folds:])
        signal.append(part["signal"].double().numpy())
        heads, mlps, tokens = heads + part["heads"].double(), mlps + part["mlps"].double(), tokens + record["tokens"]
    if not rows:
        raise DataError(
            "attribute_direction: every unit of reading ended the process and was set aside; lower attribute_direction.batch_tokens"
        )
    means = Means((heads / tokens).float(), (mlps / tokens).float())
    return Gathered(np.concatenate(rows), np.concatenate(own), np.concatenate(random), np.concatenate(signal), means)


def components_of(inputs: Inputs, records: Journal) -> list[Component]:
    """All writers in the order of the contributions, as the first reading found them; loads no model."""
    first = next(records[item.keys[0]] for item in inputs.plan() if item.kind == "writes" and item.keys[0] in records)
    return writers(inputs.held_out.place.layer, first["heads"], first["biases"])


def gap(values_N: Floats, labels_N: NDArray[np.int64]) -> Floats:
    """Mean over right traces minus mean over wrong ones."""
    return values_N[labels_N == 1].mean(0) - values_N[labels_N == 0].mean(0)


def choose(components: Sequence[Component], inputs: Inputs, gathered: Gathered) -> dict[str, list[Component]]:
    """The components of each condition: those with the largest part of the gap, and random sets of as many others."""
    ranks = inputs.ranking[gathered.rows_N]
    parts_C = gap(gathered.parts_NC[ranks], inputs.labels[gathered.rows_N][ranks])
    order = sorted((i for i, c in enumerate(components) if c.kind in ABLATABLE), key=lambda i: (-abs(parts_C[i]), i))
    top, others = order[: inputs.settings.top], sorted(order[inputs.settings.top :])
    chosen = {NONE: [], TOP: [components[i] for i in top]}
    seen: set[tuple[int, ...]] = set()
    for number, condition in enumerate(random_conditions(inputs.settings)):
        rng = np.random.default_rng([inputs.seed, number])
        for _ in range(DISTINCT_TRIES):
            found = _like(top, others, components, inputs.settings.random_sets, rng)
            if found not in seen:
                break
        seen.add(found)
        chosen[condition] = [components[i] for i in found]
    return chosen


def _like(
    top: Sequence[int], others: Sequence[int], components: Sequence[Component], wanted: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """As many heads and as many MLPs as among the top ones, where that leaves ``wanted`` different sets; else as many of any kind."""
    kinds = {kind: sum(components[i].kind == kind for i in top) for kind in ("head", "mlp")}
    among = {kind: [i for i in others if components[i].kind == kind] for kind in kinds}
    if math.prod(math.comb(len(among[kind]), count) for kind, count in kinds.items()) >= wanted:
        return tuple(sorted(int(i) for kind, count in kinds.items() for i in rng.choice(among[kind], count, replace=False)))
    return tuple(sorted(int(i) for i in rng.choice(others, min(len(top), len(others)), replace=False)))


class Attribution:
    """Does one item of the plan after the other.

    Args:
        records: finished units, by key (the journal).
        sampling: temperature, top_p, top_k, max_new_tokens of the traces.
    Raises:
        ConfigError: fewer heads and MLPs are left than are to be ablated.
    """

    def __init__(
        self,
        inputs: Inputs,
        loaded: LoadedModel,
        records: Journal,
        *,
        parts: Path,
        epoch: int,
        sampling: Json,
        checkpoints: Checkpoints,
    ) -> None:
        self.inputs, self.loaded, self.records = inputs, loaded, records
        self.parts, self.epoch, self.checkpoints = parts, epoch, checkpoints
        self.layer = inputs.held_out.direction_of(inputs.problem_ids[0]).layer
        self.pooling = inputs.held_out.direction_of(inputs.problem_ids[0]).pooling
        self.components = Components(loaded.model, self.layer)
        if 2 * inputs.settings.top > (there := len(self.components.ablatable)):
            raise ConfigError(
                f"attribute_direction.top: {inputs.settings.top} of the {there} heads and MLPs up to layer {self.layer} leave no random "
                f"set of as many others; set at most {there // 2}"
            )
        self.max_new_tokens = sampling["max_new_tokens"]
        self.sampler = Sampler(
            loaded.model,
            eos_ids=loaded.eos_ids,
            slots=inputs.settings.slots,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            slots_field="attribute_direction.slots",
        )

    @cached_property
    def gathered(self) -> Gathered:
        return gather(self.inputs, self.records, self.parts)

    @cached_property
    def chosen(self) -> dict[str, list[Component]]:
        return choose(self.components.all, self.inputs, self.gathered)

    def process(self, item: Item, stop: Stop) -> Iterator[Mapping[str, Json]]:
        """For ``OverItems``."""
        if item.kind == "writes":
            yield {item.keys[0]: self._writes(item)}
        elif item.kind == "signal":
            with self._under(item.condition):
                yield {item.keys[0]: {"signal": [float(f"{value:.7g}") for value in self._signal(self.inputs.shard(item.number))]}}
        else:
            with self._under(item.condition):
                yield from self._answers(item, stop)

    def _under(self, condition: str) -> AbstractContextManager[None]:
        return self.components.ablate(self.chosen[condition], self.gathered.means) if condition != NONE else nullcontext()

    def _writes(self, item: Item) -> Json:
        pairs = self.inputs.pairs[self.inputs.shard(item.number)]
        directions = self.inputs.directions
        found: list[Writes] = []
        places: list[int] = []
        sums: list[torch.Tensor] = []
        tokens = 0
        for batch in self._batches(pairs):
            ids_BL, pooled_BL, real_BL = self._padded([pairs[i] for i in batch])
            found.append(self.components.read(ids_BL, pooled_BL))
            places += batch
            everywhere = self.components.read(ids_BL, real_BL)
            mine = [everywhere.heads_BNI.sum(0), everywhere.mlps_BND.sum(0)]
            sums = [a + b for a, b in zip(sums, mine)] if sums else mine
            tokens += int(real_BL.sum())
        writes = Writes(*(torch.cat(column)[np.argsort(places)] for column in zip(*found)))
        folds = self.inputs.folds[self.inputs.shard(item.number)]
        contributions = self.components.contributions(writes, directions)  # once: it reads every output projection
        signal = (writes.residual_BD * directions[folds]).sum(-1)
        tensors = {"contributions": contributions, "signal": signal, "heads": sums[0], "mlps": sums[1]}
        path = self.parts / f"writes-{item.number:05d}.{self.epoch}.safetensors"  # the epoch: a late writer harms nobody
        write_file(path, lambda temporary: save_file(tensors, temporary))
        facts = {"tokens": tokens, "heads": self.components.heads, "biases": self.components.has_biases}
        return {"file": path.name, "sha256": sha256_file(path), **facts}

    def _signal(self, numbers: slice) -> Floats:
        """Logits under whatever is ablated now, by the direction that never saw the trace's problem."""
        pairs = self.inputs.pairs[numbers]
        found = np.zeros(len(pairs))
        vectors = self.inputs.directions[self.inputs.folds[numbers]].double().numpy()
        for batch in self._batches(pairs):
            ids_BL, pooled_BL, _ = self._padded([pairs[i] for i in batch])
            residual_BD = self.components.read(ids_BL, pooled_BL).residual_BD.double().numpy()
            found[batch] = (residual_BD * vectors[batch]).sum(-1)
        return found + self.inputs.biases[numbers]

    def _answers(self, item: Item, stop: Stop) -> Iterator[Mapping[str, Json]]:
        """New completions: the same draws under every condition, so that conditions are compared in pairs."""
        attempts = {key: attempt for key, attempt in zip(item.keys, item.attempts)}
        requests = [
            Request(
                key,
                self.loaded.format.prompt_ids(attempt.problem),
                self.max_new_tokens,
                draws.stream(self.inputs.seed, f"attribute {attempt.problem.id}", attempt.sample),
            )
            for key, attempt in attempts.items()
        ]
        prompts = {request.key: request.prompt_ids for request in requests}
        for step in self.sampler.run(requests, stop, self.checkpoints):
            records = {}
            for done in step:
                attempt = attempts[done.key]
                trace = make_trace(attempt, prompts[done.key], done, self.loaded.format, seed=self.inputs.seed, model=self.loaded.name)
                verdict, answer = verdict_of(trace, attempt.problem)
                records[done.key] = {"verdict": verdict, "answer": answer, "tokens": len(done.tokens)}
            yield records

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Indices of pairs of similar length, within the token budget."""
        budget = token_budget(self.inputs.settings.batch_tokens, self.loaded.device)
        lengths = [len(trace.prompt_ids) + trace.readable for trace, _ in pairs]
        waiting = sorted(range(len(pairs)), key=lambda i: (-lengths[i], i))
        while waiting:
            size = max(1, budget // max(1, lengths[waiting[0]]))
            yield waiting[:size]
            waiting = waiting[size:]

    def _padded(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, each token's share in its trace's signal, and 1 for every real token; [B, L] each."""
        width = max(len(trace.prompt_ids) + trace.readable for trace, _ in pairs)
        ids_BL, pooled_BL, real_BL = (
            torch.zeros(len(pairs), width, dtype=torch.long),
            torch.zeros(len(pairs), width),
            torch.zeros(len(pairs), width),
        )
        for row, (trace, label) in enumerate(pairs):
            ids = [*trace.prompt_ids, *trace.completion_ids[: trace.readable]]
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            real_BL[row, : len(ids)] = 1
            found = evenly_spaced(spans(self.pooling, trace, label), self.inputs.rows_per_trace)
            for span in found:
                start, end = len(trace.prompt_ids) + span.start_token, len(trace.prompt_ids) + span.end_token
                pooled_BL[row, start:end] += 1 / (len(found) * (end - start))
        return ids_BL, pooled_BL, real_BL


def read_inputs(*, traces: Path, labels: Path, held_out: HeldOut, settings: Settings, seed: int, rows_per_trace: int) -> Inputs:
    """Choose traces that the probe was measured on, in the order of the seed, half right and half wrong; read those alone.

    Raises:
        DataError: the probe was measured on other traces.
    """
    order = sorted(held_out.logit, key=lambda key: (draws.order_key(seed, key[0]), key[1]))
    each = max(1, settings.traces // 2)
    chosen = {f"{key[0]}/{key[1]}" for label in (0, 1) for key in [key for key in order if held_out.labels[key] == label][:each]}
    file = TraceFile(traces / "traces.jsonl")
    found = {trace.key: trace for trace in file.read(number for number, key in enumerate(file.keys) if key in chosen)}
    labelled = {label.key: label for label in iter_jsonl(labels / "labels.jsonl", TraceLabel) if label.key in chosen}
    if missing := chosen - (found.keys() & labelled.keys()):
        raise DataError(f"{file.path}: no trace {min(missing)}, which train_probes was measured on; run train_probes again")
    keys = [key for key in (f"{problem}/{sample}" for problem, sample in order) if key in chosen]
    problems = {problem.id: problem for problem in read_jsonl(traces / "problems.jsonl", Problem)}
    return Inputs([(found[key], labelled[key]) for key in keys], problems, held_out, settings, seed, rows_per_trace=rows_per_trace)
