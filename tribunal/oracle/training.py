"""Train an activation oracle: examples, audit, vectors on the disk, two adapters, and what is published of them.

The second adapter, ``text_only``, is trained on the same prompts, placeholders included, with nothing injected. What it reaches
is what the prompts alone give away, so it is the control that an oracle has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tribunal.core.errors import ConfigError
from tribunal.core.storage import read_json, sha256_file, write_json, write_jsonl
from tribunal.core.work import Json, Progress, Stop, Work
from tribunal.models.adapters import (
    WEIGHTS,
    detach,
    load_adapter,
    new_adapter,
    portable_config,
    publish_adapter,
    require_fit,
)
from tribunal.models.loading import LoadedModel, forget_models, identity
from tribunal.models.oracle_batches import Injection, Lesson
from tribunal.models.oracle_training import (
    KEPT,
    VALIDATION,
    InjectionTrainer,
    Validation,
    best_weights,
    kept_steps,
    make_trainer,
)
from tribunal.models.sharding import is_sharded, shard_frozen
from tribunal.oracle import figures
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.answering import Answerer, Asked
from tribunal.oracle.audit import LabelAudit, audit_examples
from tribunal.oracle.cards import control_card, oracle_card
from tribunal.oracle.corpus import Corpus
from tribunal.oracle.examples import Example
from tribunal.oracle.prompts import OraclePrompts
from tribunal.oracle.scoring import exact, fuzzy
from tribunal.oracle.settings import ADAPTER, FACTS, TEXT_ONLY, OracleFacts, OracleSettings, adapter_digest
from tribunal.oracle.vectors import VectorLayout, Vectors

RUNS = ("oracle", TEXT_ONLY)


class ExampleLessons:
    """Examples as token ids, with their vectors or with nothing to inject; satisfies ``tribunal.models.oracle_batches.Lessons``."""

    def __init__(self, examples: Sequence[Example], prompts: OraclePrompts, vectors: Vectors | None) -> None:
        self.examples, self._vectors = examples, vectors
        self.lessons = [prompts.encode(example, inject=vectors is not None) for example in examples]

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, number: int) -> Lesson:
        return self.lessons[number]

    def vectors(self, number: int) -> Tensor:
        assert self._vectors is not None
        return self._vectors.of(self.examples[number])


class OracleTraining:
    """Everything that the training of one oracle needs, put together from settings and inputs.

    Args:
        source: hands out activations; it has checked that the model is theirs.
        planted: whether the model's signals were put there by its training.
    Raises:
        UserError: a layer out of range, an adapter of another model, labels that cannot be trained on.
    """

    def __init__(
        self, loaded: LoadedModel, settings: OracleSettings, corpus: Corpus, source: ActivationSource, *, seed: int, planted: bool
    ) -> None:
        self.loaded, self.settings, self.corpus, self.source, self.seed, self.planted = loaded, settings, corpus, source, seed, planted
        self.injection = Injection(**settings.injection.model_dump())
        self.prompts = OraclePrompts(loaded, settings.placeholder)
        self.answerer = Answerer(
            loaded,
            self.prompts,
            self.injection,
            slots=settings.slots,
            max_new_tokens=settings.max_new_tokens,
            batch_tokens=settings.batch_tokens,
        )
        if settings.start_from is not None:
            require_fit(loaded, settings.start_from)
        self.audit.require()

    @cached_property
    def audit(self) -> LabelAudit:
        return audit_examples(
            self.corpus.examples,
            self.settings.audit,
            tasks=self.settings.tasks,
            problems=self.corpus.problems,
            count_tokens=lambda text: len(self.prompts.target_ids(text)),
            max_new_tokens=self.settings.max_new_tokens,
            warnings=self.corpus.warnings,
        )

    # Vectors ------------------------------------------------------------------------------------------------------------

    @cached_property
    def train(self) -> list[Example]:
        return self.corpus.of_split("train")

    @cached_property
    def validation(self) -> list[Example]:
        """The same examples at every validation: evenly spaced ones of each task."""
        every = self.corpus.of_split("validation")
        return [e for task in self.settings.tasks for e in spread([e for e in every if e.task == task], self.settings.validate_items)]

    @cached_property
    def layout(self) -> VectorLayout:
        return VectorLayout([*self.train, *self.validation], self.settings.traces_per_file)

    def write_vectors(self, number: int, path: Path) -> Json:
        """Write one file of vectors; returns its record."""
        self.layout.write(number, self.source, path, self.loaded.model.dtype)
        return {"file": path.name, "sha256": sha256_file(path)}

    # Training -----------------------------------------------------------------------------------------------------------

    def require_processes(self, world: int) -> None:
        """Refuse a number of processes that these settings do not suit, before anything is read.

        Raises:
            ConfigError: names the field and the cure.
        """
        if self.settings.batch_size % world:
            raise ConfigError(
                f"train_oracle.batch_size: {self.settings.batch_size} examples in a step cannot be shared equally by {world} processes; "
                "set a multiple, or another number of GPUs"
            )
        if self.settings.shard and world == 1:
            raise ConfigError("train_oracle.shard: this is one process, which has nobody to share with; set slurm.gpus or leave it out")

    @property
    def steps(self) -> int:
        """Optimizer steps of the oracle."""
        whole = math.ceil(self.settings.epochs * len(self.train) / self.settings.batch_size)
        return self.settings.steps or max(1, whole)

    @property
    def text_only_steps(self) -> int:
        given = self.settings.text_only_steps
        return self.steps if given is None else given

    @property
    def validate_at(self) -> frozenset[int]:
        every = self.settings.validate_every or max(1, self.steps // 10)
        return frozenset([*range(every, self.steps + 1, every), self.steps])

    @property
    def keep_at(self) -> frozenset[int]:
        count = min(self.settings.keep, self.steps)
        return frozenset(round(self.steps * (i + 1) / count) for i in range(count))

    def oracle_trainer(self, files: Callable[[], Sequence[Path]], output_dir: Path, callbacks: list[Any]) -> InjectionTrainer:
        """The oracle's Trainer. ``files`` gives the written vectors by number."""
        vectors = Vectors(self.layout, files())
        asked = [Asked(example, vectors.of(example)) for example in self.validation]
        return self._trainer(
            output_dir,
            callbacks,
            lessons=ExampleLessons(self.train, self.prompts, vectors),
            steps=self.steps,
            validate=partial(self.validate, asked),
            validate_at=self.validate_at,
            keep_at=self.keep_at,
        )

    def text_only_trainer(self, output_dir: Path, callbacks: list[Any]) -> InjectionTrainer:
        """The control's Trainer: same prompts, order and settings, nothing injected."""
        lessons = ExampleLessons(self.train, self.prompts, None)
        nothing: frozenset[int] = frozenset()
        return self._trainer(
            output_dir, callbacks, lessons=lessons, steps=self.text_only_steps, validate=None, validate_at=nothing, keep_at=nothing
        )

    def _trainer(self, output_dir: Path, callbacks: list[Any], **given: Any) -> InjectionTrainer:
        settings = self.settings
        if settings.shard:
            shard_frozen(self.loaded.model)
        if settings.start_from is None:
            peft = new_adapter(self.loaded, settings.lora, seed=self.seed)
        else:
            peft = load_adapter(self.loaded, settings.start_from, trainable=True)
        return make_trainer(
            output_dir,
            callbacks,
            peft=peft,
            injection=self.injection,
            pad_id=0,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            learning_rate=settings.learning_rate,
            schedule=settings.schedule,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=self.loaded.model.dtype == torch.bfloat16 if settings.bf16 is None else settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing,
            seed=self.seed,
            **given,
        )

    def validate(self, asked: Sequence[Asked]) -> Validation:
        """Judge the adapter that is on the model: greedy answers, and the loss of the right ones."""
        answers, losses = self.answerer.answers(asked), self.answerer.losses(asked)
        tasks: dict[str, Json] = {}
        for task in self.settings.tasks:
            mine = [i for i, question in enumerate(asked) if question.example.task == task]
            examples = [asked[i].example for i in mine]
            tokens = sum(losses[i][1] for i in mine)
            tasks[task] = {
                "score": _mean([fuzzy(task, answers[i], e.target, e.choices) for i, e in zip(mine, examples)]),
                "exact": _mean([float(exact(answers[i], e.target)) for i, e in zip(mine, examples)]),
                "loss": sum(losses[i][0] for i in mine) / tokens,
                "n": len(mine),
            }
        return Validation(_mean([row["score"] for row in tasks.values()]), _mean([row["loss"] for row in tasks.values()]), tasks)


def spread(items: Sequence[Example], most: int) -> list[Example]:
    """At most so many, evenly spaced.

    A trace has several items in its own order. A spacing of whole items would always meet the same one of them, such as the earliest
    sentence, so it begins a place later each time.
    """
    if len(items) <= most:
        return list(items)
    spacing, rest = divmod(len(items), most)
    return [items[i * len(items) // most + (0 if rest else i % spacing)] for i in range(most)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Phases:
    """Works done one after the other, as one ``Work``; a unit of any of them is a unit of the whole.

    Args:
        loaded: what they put adapters on; it is left as it was, since the next job of this process may get the same object.
        unit: the unit's name.
    """

    def __init__(self, phases: Sequence[Work], loaded: LoadedModel, unit: str) -> None:
        self.phases, self.loaded, self.unit = phases, loaded, unit

    def run(self, stop: Stop) -> bool:
        try:
            return all(phase.run(stop) for phase in self.phases)
        finally:
            detach(self.loaded.model)
            if is_sharded(self.loaded.model):
                forget_models()

    def progress(self) -> Progress:
        parts = [phase.progress() for phase in self.phases]
        return Progress(sum(part.done for part in parts), sum(part.total or 0 for part in parts), self.unit)


class LaterSteps:
    """Metrics of a run whose steps are numbered after another run's."""

    def __init__(self, metrics: Any, after: int) -> None:
        self.metrics, self.after = metrics, after

    def row(self, *, step: int, **numbers: float) -> None:
        self.metrics.row(step=self.after + step, **numbers)


# What is published ------------------------------------------------------------------------------------------------------


def publish(training: OracleTraining, out: Path, *, oracle: Path, text_only: Path | None, rows: Sequence[Json], experiment: str) -> None:
    """Write adapters, metrics, facts, the audit and the figure.

    Args:
        oracle, text_only: the folders of the finished runs.
        rows: one per optimizer step, the text-only run's numbered after the oracle's.
    """
    validation: list[Json] = read_json(oracle / KEPT / VALIDATION)
    best = max(validation, key=lambda row: (row["score"], -row["loss"], -row["step"]))
    kept = kept_steps(oracle)
    loaded, settings = training.loaded, training.settings
    facts = OracleFacts(
        model=identity(loaded),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        seed=training.seed,
        tasks=settings.tasks,
        examples=settings.examples.model_dump(mode="json"),
        examples_sha256=training.corpus.digest,
        injection=settings.injection.model_dump(),
        placeholder=training.prompts.placeholder,
        max_new_tokens=settings.max_new_tokens,
        slots=settings.slots,
        steps=training.steps,
        best_step=best["step"],
        kept=sorted(kept),
        text_only_steps=training.text_only_steps,
        start_from=adapter_digest(settings.start_from) if settings.start_from is not None else None,
        counts=training.corpus.counts(),
        validation=best,
        planted=training.planted,
    )
    write_json(out / FACTS, facts.model_dump(mode="json"))
    write_json(out / "audit.json", training.audit.as_json())
    config = portable_config(oracle, loaded.name, loaded.revision)
    by_step = {row["step"]: row["tasks"] for row in validation}
    published = {out / ADAPTER: (best_weights(oracle), oracle_card(settings, facts, facts.best_step, best["tasks"]))}
    for step, weights in kept.items():
        published[facts.adapter(out, step)] = weights, oracle_card(settings, facts, step, by_step.get(step, {}))
    if text_only is not None:
        published[out / TEXT_ONLY] = text_only / WEIGHTS, control_card(settings, facts)
    for folder, (weights, card) in published.items():
        publish_adapter(weights, config, folder, card)
    judged = {row["step"]: {key: row[key] for key in ("score", "loss", "tasks")} for row in validation}
    write_jsonl(out / "metrics.jsonl", (_metrics(row, training.steps, judged) for row in rows))
    figures.training(rows, validation, training.steps, out / figures.TRAINING, title=f"{experiment}: training of the activation oracle")


def _metrics(row: Json, steps: int, judged: Mapping[int, Json]) -> Json:
    """A row of ``metrics.jsonl``: which run, its step, the numbers, and validation where there was one."""
    later = row["step"] > steps
    numbers = {name: value for name, value in row.items() if name != "epoch"}  # of the Trainer's one pass over the steps
    found = {**numbers, "run": RUNS[later], "step": row["step"] - steps * later}
    return {**found, "validation": judged[row["step"]]} if not later and row["step"] in judged else found


def refuse(settings: OracleSettings, n_layers: int, where: str) -> None:
    """Refuse layers that the model has not got, before anything is loaded.

    Raises:
        ConfigError: names the field and the layers there are.
    """
    asked = {"injection.layer": [settings.injection.layer], "examples.layers": settings.examples.layers or []}
    for field, layers in asked.items():
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise ConfigError(f"{where}.{field}: no layer {layer}; the model has {n_layers} layers, 0 to {n_layers - 1}")
    if settings.injection.layer == n_layers - 1:
        raise ConfigError(
            f"{where}.injection.layer: {n_layers - 1} is the last block: no later token sees what is injected there; take an earlier one"
        )
