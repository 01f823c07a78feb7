"""Steer a model along its probe's direction while it reasons: what is tried, on which traces, and what each attempt gives.

Every trace is steered with the direction that was fitted without its problem. A strength is a multiple of the mean length
of the residual stream at that layer, so that every direction is added at equal length. All conditions draw a trace's
tokens from the same stream of random numbers, which is not the one that the trace was first sampled with: without
steering a wrong trace is often right the second time, and that, not zero, is what steering has to beat.

Shapes: L tokens, D model width, F folds.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem, Record, Trace, TraceLabel, Verdict
from tribunal.core.storage import iter_jsonl
from tribunal.core.work import Checkpoints, Json, Stop
from tribunal.models import draws
from tribunal.models.formats import PromptFormat
from tribunal.models.generation import Finished, Request, Sampler
from tribunal.models.loading import LoadedModel, identity
from tribunal.models.residual import Change, Gate, Steering, capture
from tribunal.probes import direction
from tribunal.probes.direction import Directions, Model, Place
from tribunal.probes.held_out import read_held_out
from tribunal.traces import sampling
from tribunal.traces.files import TraceFile
from tribunal.traces.labels import verdict_of

Floats = NDArray[np.float64]

CLASSES: tuple[Verdict, Verdict] = ("incorrect", "correct")
CONTRAST = "diff_of_means"
NGRAM = 4


class Condition(NamedTuple):
    """One way of intervening, the same for all traces."""

    start: str  # "prompt" | "middle": from which token on
    layer: int
    action: str  # "none" | "add" | "project_out" | "adaptive": add only where the probe's signal is low
    direction: str  # "none" | "probe" | "diff_of_means" | "random"
    strength: float  # what is added, in multiples of the mean residual length; 0 where nothing is
    number: int = 0  # of the random direction

    @property
    def key(self) -> str:
        name = f"{self.direction}-{self.number:02d}" if self.direction == "random" else self.direction
        return f"{self.start}/layer_{self.layer}/{self.action}/{name}/{self.strength:+g}"

    def intervention(self, fold: int) -> str:
        """The name that a sampler knows this by, for the traces of one fold; the start does not matter."""
        return "" if self.action == "none" else f"{self.key.partition('/')[2]}/fold_{fold}"


class Chosen(NamedTuple):
    """A trace that is steered."""

    trace: Trace
    problem: Problem
    was: Verdict
    fold: int
    middle: int  # completion tokens that are kept when it is steered from its middle

    def kept(self, start: str) -> int:
        return self.middle if start == "middle" else 0


class Attempt(NamedTuple):
    """One completion to sample: the unit."""

    condition: Condition
    chosen: Chosen
    draw: int

    @property
    def key(self) -> str:
        return f"{self.condition.key}|{self.chosen.trace.key}/{self.draw}"


class SteeredTrace(Record):
    """One line of ``steering.jsonl``."""

    start: str
    layer: int
    action: str
    direction: str
    strength: float
    number: int
    added_norm: float
    problem_id: str
    sample: int
    draw: int
    was: Verdict
    verdict: Verdict
    answer: str | None
    finish_reason: str
    kept_tokens: int
    tokens: int
    repetition: float
    compression: float | None
    completion_ids: list[int]
    continued: bool


class ProbeDirections(NamedTuple):
    """Unit vectors to steer along, by fold."""

    place: Place
    model: Model
    template_sha256: str | None
    planted: bool
    held_out: bool
    """Each was fitted without the traces that it steers; False: one of all traces, for a place that is not the headline's."""
    folds: dict[str, int]
    probe: dict[int, Floats]
    contrast: dict[int, Floats]


def read_directions(folder: Path, layer: int | None = None, pooling: str | None = None, kind: str | None = None) -> ProbeDirections:
    """The directions of a place, the headline's by default; only that one was kept for each fold.

    Raises:
        DataError: there is no such direction, or no difference of means beside it; names those there are.
    """
    held_out, published = read_held_out(folder), direction.load(folder)
    wanted = published.select(layer, pooling, kind)
    place = Place(layer=wanted.layer, pooling=wanted.pooling, kind=wanted.kind)
    known = held_out.file.model, held_out.file.template_sha256, held_out.file.planted
    if place == held_out.place:
        problems = {fold: problem for problem, fold in held_out.folds.items()}
        probe = {fold: _unit(held_out.direction_of(problem).vector) for fold, problem in problems.items()}
        contrast = {fold: _unit(held_out.diff_of_means_of(problem).vector) for fold, problem in problems.items()}
        return ProbeDirections(place, *known, True, held_out.folds, probe, contrast)
    means = _contrast_of(published, place, folder)
    return ProbeDirections(
        place, *known, False, dict.fromkeys(held_out.folds, 0), {0: _unit(wanted.vector)}, {0: _unit(means.vector)}
    )  # fmt: skip


def _contrast_of(published: Directions, place: Place, folder: Path) -> direction.Direction:
    try:
        return published.select(place.layer, place.pooling, CONTRAST)
    except DataError:
        raise DataError(f"{folder}: no {CONTRAST} direction; add it to train_probes.kinds and run train_probes again") from None


def _unit(vector: Sequence[float]) -> Floats:
    array = np.asarray(vector, dtype=np.float64)
    length = np.linalg.norm(array)
    if length == 0:
        raise DataError(
            "steer: a direction of the folds is zero: nothing told the classes apart there; choose another steer.layer or pooling"
        )
    return array / length


def random_direction(width: int, seed: int, layer: int, number: int) -> Floats:
    """A unit vector that is uniform over all directions."""
    return _unit(np.random.default_rng([seed, layer, number]).standard_normal(width).tolist())


def conditions(settings: Mapping[str, Any], layer: int, kind: str) -> list[Condition]:
    """All conditions in their fixed order.

    A random direction's opposite is as random, so those of one length stand beside both signs of the probe.
    """
    made = []
    randoms = range(settings["random_directions"])
    both = [sign * strength for strength in settings["strengths"] for sign in (1, -1)]
    for start in settings["start"]:
        made.append(Condition(start, layer, "none", "none", 0.0))
        for place in (layer, *settings["upstream_layers"]):
            made += [Condition(start, place, "add", "probe", strength) for strength in both]
            made += [Condition(start, place, "add", "random", s, n) for s in settings["strengths"] for n in randoms]
            if kind != CONTRAST:
                made += [Condition(start, place, "add", CONTRAST, strength) for strength in both]
        if settings["project_out"]:
            made.append(Condition(start, layer, "project_out", "probe", 0.0))
            made += [Condition(start, layer, "project_out", "random", 0.0, n) for n in randoms]
        for strength in settings["adaptive_strengths"]:
            made.append(Condition(start, layer, "adaptive", "probe", strength))
            made += [Condition(start, layer, "adaptive", "random", strength, n) for n in randoms]
    return made


class SteeringRun:
    """The plan of the job ``steer``, and how its attempts are made.

    Args:
        traces, labels, probes: results folders of generate_traces, label_traces and train_probes.
        settings: the job's section, nothing left to a default.
        seed: the experiment's.

    Raises:
        DataError: no trace of a class can be steered, or a direction is missing.
    """

    def __init__(self, *, traces: Path, labels: Path, probes: Path, settings: Mapping[str, Any], seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.directions = read_directions(probes, settings["layer"], settings["pooling"], settings["kind"])
        self.layer = self.directions.place.layer
        self.conditions = conditions(settings, self.layer, self.directions.place.kind)
        problems = {problem.id: problem for problem in iter_jsonl(traces / "problems.jsonl", Problem)}
        file = TraceFile(traces / "traces.jsonl")
        place = {key: number for number, key in enumerate(file.keys)}
        listed = [label for label in iter_jsonl(labels / "labels.jsonl", TraceLabel) if label.problem_id in self.directions.folds]
        self.chosen: list[Chosen] = []
        for verdict in CLASSES:
            picked = _one_of_each_problem(listed, verdict)[: settings["traces_per_class"]]
            if not picked:
                raise DataError(
                    f"{labels / 'labels.jsonl'}: no {verdict} trace to steer; sample more traces, or problems of another difficulty"
                )
            for label, trace in zip(picked, file.read(place[label.key] for label in picked), strict=True):
                fold = self.directions.folds[trace.problem_id]
                self.chosen.append(Chosen(trace, problems[trace.problem_id], verdict, fold, middle_of(trace, label)))
        # from the end of the order, so that they are other traces than the steered ones where there are enough
        right = _one_of_each_problem(listed[::-1], "correct")[: settings["calibration_traces"]]
        self._calibration = list(file.read(place[label.key] for label in right))

    @cached_property
    def attempts(self) -> list[Attempt]:
        """The plan: condition by condition, so that a wave's rows are about equally long."""
        return [Attempt(c, chosen, draw) for c in self.conditions for chosen in self.chosen for draw in range(self.settings["draws"])]

    def waves(self) -> list[Sequence[Attempt]]:
        size = self.settings["wave_size"]
        return [self.attempts[first : first + size] for first in range(0, len(self.attempts), size)]

    def sampling(self, loaded: LoadedModel, checkpoints: Checkpoints) -> Any:
        """``process`` for waves of attempts.

        Raises:
            DataError: the directions belong to another model or prompt format.
            ConfigError: ``max_new_tokens`` is too low for a start in the middle, or too high for the model.
        """
        self._refuse_another(loaded)
        self._check_lengths(loaded)
        units, steering = self.interventions(loaded)
        settings = self.settings
        sampler = Sampler(
            loaded.model,
            eos_ids=loaded.eos_ids,
            slots=settings["slots"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            top_k=settings["top_k"],
            max_cache_gb=settings["max_cache_gb"],
            slots_field="steer.slots",
            steering=steering,
        )

        def process(wave: Sequence[Attempt], stop: Stop) -> Iterator[Mapping[str, Json]]:
            attempts = {attempt.key: attempt for attempt in wave}
            for step in sampler.run([self._request(attempt) for attempt in wave], stop, checkpoints):
                yield {done.key: self._record(attempts[done.key], done, loaded.format, units).model_dump(mode="json") for done in step}

        return process

    def interventions(self, loaded: LoadedModel) -> tuple[dict[int, float], Steering]:
        """The mean residual length by layer, and all interventions for all folds."""
        settings, probe = self.settings, self.directions.probe
        layers = [self.layer, *settings["upstream_layers"]]
        lengths: dict[int, list[Floats]] = {layer: [] for layer in layers}
        signals: dict[int, list[Floats]] = {fold: [] for fold in probe}
        for trace in self._calibration:
            ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids[: trace.readable]]])
            seen = {layer: h[0, len(trace.prompt_ids) :].double().cpu().numpy() for layer, h in capture(loaded.model, ids, layers).items()}
            for layer, acts_LD in seen.items():
                lengths[layer].append(np.linalg.norm(acts_LD, axis=1))
            for fold, unit_D in probe.items():
                signals[fold].append(seen[self.layer] @ unit_D)
        units = {layer: float(np.concatenate(lengths[layer]).mean()) for layer in layers}
        below = {fold: float(np.percentile(np.concatenate(signals[fold]), settings["adaptive_percentile"])) for fold in probe}
        table = {}
        for condition in dict.fromkeys(c._replace(start="") for c in self.conditions if c.action != "none"):
            for fold in probe:
                gate = Gate(torch.tensor(probe[fold]), below[fold]) if condition.action == "adaptive" else None
                vector = torch.tensor(self._vector(condition, fold))
                if condition.action == "project_out":
                    change = Change(condition.layer, remove_D=vector)
                else:
                    change = Change(condition.layer, add_D=condition.strength * units[condition.layer] * vector, gate=gate)
                table[condition.intervention(fold)] = [change]
        return units, Steering(table)

    def _vector(self, condition: Condition, fold: int) -> Floats:
        """The unit vector of a condition for the traces of a fold. Upstream it is the same as at the probe's own layer."""
        if condition.direction == "random":
            width = len(next(iter(self.directions.probe.values())))
            return random_direction(width, self.seed, condition.layer, condition.number)
        return (self.directions.probe if condition.direction == "probe" else self.directions.contrast)[fold]

    def _request(self, attempt: Attempt) -> Request:
        trace, start = attempt.chosen.trace, attempt.condition.start
        kept = attempt.chosen.kept(start)
        return Request(
            attempt.key,
            [*trace.prompt_ids, *trace.completion_ids[:kept]],
            self.settings["max_new_tokens"] - kept,
            draws.stream(self.seed, f"steer/{start}/{trace.key}", attempt.draw),
            attempt.condition.intervention(attempt.chosen.fold),
        )

    def _record(self, attempt: Attempt, done: Finished, prompt_format: PromptFormat, units: Mapping[int, float]) -> SteeredTrace:
        condition, chosen = attempt.condition, attempt.chosen
        kept = chosen.kept(condition.start)
        whole = Finished(
            done.key,
            [*chosen.trace.completion_ids[:kept], *done.tokens],
            [*chosen.trace.logprobs[:kept], *done.logprobs],
            done.finish_reason,
            done.continued,
        )
        asked = sampling.Attempt(chosen.problem, chosen.trace.sample)
        trace = sampling.make_trace(asked, chosen.trace.prompt_ids, whole, prompt_format, seed=self.seed, model=chosen.trace.model)
        verdict, answer = verdict_of(trace, chosen.problem)
        readable = trace.completion_ids[kept : trace.readable]
        return SteeredTrace(
            **condition._asdict(),
            added_norm=abs(condition.strength) * units[condition.layer],
            problem_id=trace.problem_id,
            sample=trace.sample,
            draw=attempt.draw,
            was=chosen.was,
            verdict=verdict,
            answer=answer,
            finish_reason=done.finish_reason,
            kept_tokens=kept,
            tokens=len(done.tokens),
            repetition=repetition(readable),
            compression=compression(prompt_format.decode(readable)),
            completion_ids=done.tokens,
            continued=done.continued,
        )

    def _check_lengths(self, loaded: LoadedModel) -> None:
        most, positions = self.settings["max_new_tokens"], loaded.shape.max_positions
        for chosen in self.chosen:
            kept = max(chosen.kept(start) for start in self.settings["start"])
            if kept >= most:
                raise ConfigError(
                    f"steer.max_new_tokens: {most}, but {kept} tokens of trace {chosen.trace.key} are kept when it is steered from its "
                    "middle; set it as high as generate_traces.max_new_tokens was"
                )
            if positions is not None and len(chosen.trace.prompt_ids) + most > positions:
                raise ConfigError(
                    f"steer.max_new_tokens: {most} do not fit the model's {positions} positions after the {len(chosen.trace.prompt_ids)} "
                    f"tokens of prompt {chosen.trace.problem_id}; use at most {positions - len(chosen.trace.prompt_ids)}"
                )

    def _refuse_another(self, loaded: LoadedModel) -> None:
        known, ours = self.directions.model, identity(loaded)
        for field in ("name", "revision", "d_model"):
            if (theirs := getattr(known, field)) != ours[field]:
                raise DataError(
                    f"steer: the directions belong to a model with {field} {theirs}, the experiment's has {ours[field]}; "
                    "run the calibration again under another experiment name"
                )
        if self.directions.template_sha256 not in (None, loaded.format.template_sha256):
            raise DataError("steer: the probe was trained on traces of another prompt format; run the calibration again under another name")


def _one_of_each_problem(labels: Sequence[TraceLabel], verdict: Verdict) -> list[TraceLabel]:
    """The first trace of each problem with this verdict: problems are independent, samples of one are not."""
    found: dict[str, TraceLabel] = {}
    for label in labels:
        if label.verdict == verdict:
            found.setdefault(label.problem_id, label)
    return list(found.values())


def middle_of(trace: Trace, label: TraceLabel) -> int:
    """Completion tokens up to the sentence end that is nearest to the middle of the thought (of the whole, where there is none).

    Where the text is a single sentence: half of its tokens.
    """
    end = trace.readable if trace.thought_end is None else min(trace.readable, trace.thought_end)
    inside = [span.end_token for span in label.sentences if 0 < span.end_token < end]
    return min(inside, key=lambda token: abs(2 * token - end)) if inside else end // 2


def repetition(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that were there before; 0 for a text without such runs, towards 1 for a loop."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return round(1 - len(set(grams)) / len(grams), 6) if grams else 0.0


def compression(text: str) -> float | None:
    """Bytes after zlib by bytes before; low for a text that repeats itself, None for an empty one. Short texts are above 1."""
    raw = text.encode()
    return round(len(zlib.compress(raw)) / len(raw), 6) if raw else None
