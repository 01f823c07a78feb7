"""Ask a trained oracle about held-out problems, beside everything it must beat: does it read the activations?

    python -m jobs.evaluate_oracle experiments/demo.yaml [evaluate_oracle.steps=[100,400]]

Reads traces, labels and train_oracle; writes report.json, items.jsonl (every question with every answer) and oracle_results.png.
A unit is a file of vectors, a probe, or the answers to some questions under one condition.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tribunal.cluster.job import Job, Shard
from tribunal.core.config import ADAPTERS, NO_EFFECT_ON_RESULTS, Experiment, Section, SlurmJob
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.work import Json, OverItems, Work, one_record
from tribunal.oracle.settings import OracleSettings, adapter_digest
from tribunal.oracle.storage import file_key, written

if TYPE_CHECKING:
    from tribunal.oracle.evaluation import OracleEvaluation, Unit


class Config(Section):
    """What is asked, and how it is judged."""

    items_per_task: int = Field(400, ge=2, description="held-out items of each task, evenly spaced")
    steps: list[int] | Literal["all"] = Field("all", description="kept checkpoints that are asked too, besides the best one")
    published: list[str] = Field(
        [],
        description="adapters of others (PEFT folders or hub names, name@commit) that are asked the same questions",
        json_schema_extra=ADAPTERS,
    )
    chunk: int = Field(200, ge=1, description="questions answered together, the unit that a stop can cost (it can change low bits)")
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")
    traces_per_file: int = Field(
        256, ge=1, description="traces whose activations are read together", json_schema_extra=NO_EFFECT_ON_RESULTS
    )


class EvaluateOracle(Job[Config]):
    name = "evaluate_oracle"
    needs = ("generate_traces", "label_traces", "label_sentences", "extract_activations", "train_oracle")
    uses = ("model", "seed")
    resources = SlurmJob(time="2:00:00", nodes=1, gpus=1, cpus=8, mem_gb=64)

    def __init__(self, experiment: Experiment, shard: Shard | None = None) -> None:
        super().__init__(experiment, shard)
        reads = experiment.section("train_oracle", OracleSettings).reads
        self.needs = ("generate_traces", "label_traces", *reads, "train_oracle")  # type: ignore[misc, assignment]

    def check(self) -> None:
        from tribunal.models.adapters import refuse_foreign

        refuse_foreign(self.config.published, self.experiment.model.name)

    def fingerprint(self) -> Json:
        values = super().fingerprint()
        if self.config.published:
            values["published"] = [adapter_digest(source) for source in self.config.published]
        return values

    @cached_property
    def evaluation(self) -> OracleEvaluation:
        from tribunal.activations.store import ActivationSet
        from tribunal.models.loading import load_model
        from tribunal.oracle.activations import ActivationSource
        from tribunal.oracle.corpus import Corpus
        from tribunal.oracle.evaluation import OracleEvaluation
        from tribunal.oracle.settings import read_facts
        from tribunal.oracle.tasks.task import ExampleSettings

        folder = self.results_of("train_oracle")
        facts = read_facts(folder)
        steps = facts.kept if self.config.steps == "all" else self.config.steps
        if missing := [step for step in steps if step not in facts.kept]:
            raise ConfigError(
                f"{self.experiment.path}: evaluate_oracle.steps: no checkpoint of step {missing[0]} was kept; "
                f"there are {', '.join(map(str, facts.kept))}"
            )
        loaded = load_model(self.experiment.model)
        corpus = Corpus(
            loaded,
            traces=self.results_of("generate_traces"),
            labels=self.results_of("label_traces"),
            sentence_labels=self.results_of("label_sentences") if "label_sentences" in self.needs else None,
            tasks=facts.tasks,
            settings=ExampleSettings.model_validate(facts.examples),
            seed=facts.seed,
        )
        if corpus.digest != facts.examples_sha256:
            raise DataError(
                f"{folder}: the oracle was trained on other examples than its traces, labels and question files give now; "
                "remove that folder and run train_oracle again"
            )
        store = ActivationSet.open(self.results_of("extract_activations")) if "extract_activations" in self.needs else None
        return OracleEvaluation(
            loaded,
            facts,
            folder,
            corpus,
            ActivationSource(loaded, corpus.traces, store),
            steps=steps,
            published=list(dict.fromkeys(self.config.published)),
            items_per_task=self.config.items_per_task,
            chunk=self.config.chunk,
            traces_per_file=self.config.traces_per_file,
            seed=self.experiment.seed,
        )

    def build(self) -> Work:
        from tribunal.models.oracle_training import SharedFiles
        from tribunal.oracle.training import Phases
        from tribunal.oracle.vectors import Vectors

        evaluation, opened = self.evaluation, dict[str, Vectors]()

        def make(number: int) -> Json:
            return evaluation.write_vectors(number, self.parts / f"{file_key(number)}.{self.epoch}.safetensors")

        def ask(unit: Unit) -> Json:
            if not opened:  # once, when all are written
                opened["vectors"] = Vectors(evaluation.layout, written(self.journal, self.parts, len(evaluation.layout.files)))
            return evaluation.run(unit, opened["vectors"])

        one = one_record(ask, lambda unit: unit.key)
        device = evaluation.loaded.device
        files = SharedFiles(len(evaluation.layout.files), make=make, key=file_key, journal=self.journal, device=device)
        items = OverItems(evaluation.plan(), keys=lambda unit: [unit.key], process=one, journal=self.journal)
        return Phases([files, items], evaluation.loaded, "unit")

    def publish(self, out: Path) -> None:
        from tribunal.oracle.report import publish

        records = {unit.key: self.journal[unit.key] for unit in self.evaluation.plan() if unit.key in self.journal}
        publish(self.evaluation, out, records=records, bootstrap=self.config.bootstrap, experiment=self.experiment.name)


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("evaluate_oracle")
