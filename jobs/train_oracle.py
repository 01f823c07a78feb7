"""Train an activation oracle: the model with an adapter that answers questions about its own activations in words.

    python -m jobs.train_oracle experiments/demo.yaml [train_oracle.steps=100]

Reads traces and labels (and what label_sentences says, where a task asks about that); writes PEFT folders (adapter/, text_only/,
checkpoints/), oracle.json, audit.json, metrics.jsonl and training.png. A unit is a file of vectors or an optimizer step.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribunal.cluster.job import Job, Shard, root
from tribunal.core.config import Experiment, SlurmJob
from tribunal.core.storage import Journal, sha256_json
from tribunal.core.work import Json, Work
from tribunal.oracle.settings import TEXT_ONLY, OracleSettings, adapter_digest, available, question_files
from tribunal.oracle.storage import file_key, written

if TYPE_CHECKING:
    from tribunal.oracle.training import OracleTraining


class Config(OracleSettings):
    """How the oracle is trained."""


class TrainOracle(Job[Config]):
    name = "train_oracle"
    needs = ("generate_traces", "label_traces", "label_sentences", "extract_activations")
    uses = ("model", "seed")
    distributed = True
    resources = SlurmJob(time="4:00:00", nodes=1, gpus=1, cpus=8, mem_gb=64)

    def __init__(self, experiment: Experiment, shard: Shard | None = None) -> None:
        super().__init__(experiment, shard)
        # label_sentences and extract_activations are read only where a task or a setting asks for them
        self.needs = ("generate_traces", "label_traces", *self.config.reads)  # type: ignore[misc, assignment]

    def check(self) -> None:
        from tribunal.models.adapters import refuse_foreign
        from tribunal.models.describe import describe_model
        from tribunal.oracle.tasks.task import require
        from tribunal.oracle.training import refuse

        where = f"{self.experiment.path}: {self.name}"
        refuse_foreign([self.config.start_from] if self.config.start_from is not None else [], self.experiment.model.name)
        require(self.config.tasks, available(self.experiment, self.config.examples), where)
        self.config.examples.require_files(where)
        refuse(self.config, describe_model(self.experiment.model).n_layers, where)

    def fingerprint(self) -> Json:
        values = super().fingerprint() | {"files": question_files(self.config.examples)}
        if self.config.start_from is not None:
            values["start_from"] = adapter_digest(self.config.start_from)
        return values

    @cached_property
    def training(self) -> OracleTraining:
        from tribunal.activations.store import ActivationSet
        from tribunal.models.loading import load_model
        from tribunal.oracle.activations import ActivationSource
        from tribunal.oracle.corpus import Corpus
        from tribunal.oracle.training import OracleTraining

        loaded = load_model(self.experiment.model)
        store = ActivationSet.open(self.results_of("extract_activations")) if self.config.from_store else None
        corpus = Corpus(
            loaded,
            traces=self.results_of("generate_traces"),
            labels=self.results_of("label_traces"),
            sentence_labels=self.results_of("label_sentences") if "label_sentences" in self.needs else None,
            tasks=self.config.tasks,
            settings=self.config.examples,
            seed=self.experiment.seed,
        )
        return OracleTraining(
            loaded,
            self.config,
            corpus,
            ActivationSource(loaded, corpus.traces, store),
            seed=self.experiment.seed,
            planted=self.experiment.model.name.startswith("builtin:"),
        )

    def build(self) -> Work:
        from tribunal.models.oracle_training import SharedFiles, rank_and_world
        from tribunal.models.tracking import require_login, tracker
        from tribunal.models.training import TrainerWork
        from tribunal.oracle.training import LaterSteps, Phases

        training, (rank, world) = self.training, rank_and_world()
        training.require_processes(world)
        if rank == 0:
            if self.config.tracker is not None:
                require_login(self.config.tracker)
            print(f"{self.name}: the labels\n{training.audit.table()}", flush=True)
        journal = self.journal if rank == 0 else Journal(self.state / "journal", writer=f"rank-{rank}.{self.epoch}")

        def make(number: int) -> Json:
            record = training.write_vectors(number, self.parts / f"{file_key(number)}.{self.epoch}.safetensors")
            self.receipt_notes |= {"traces_run": training.source.passes, "vectors_from_store": training.source.read}
            self.receipt_notes["oom_halvings"] = training.source.batches.halvings
            return record

        def oracle(output_dir: Path, callbacks: list[Any]) -> Any:
            if self.config.tracker is not None:
                run_id = f"{self.experiment.name}-{sha256_json(self.owner)[:12]}"
                callbacks = [*callbacks, tracker(self.config.tracker, run_id, root() / "tracking")]
            return training.oracle_trainer(lambda: written(journal, self.parts, len(training.layout.files)), output_dir, callbacks)

        steps, later = training.steps, training.text_only_steps
        phases: list[Work] = [
            SharedFiles(len(training.layout.files), make=make, key=file_key, journal=journal, device=training.loaded.device),
            TrainerWork(oracle, self.checkpoints("oracle"), self.state / "scratch", steps=steps, metrics=self.metrics),
        ]
        if later:
            store, metrics = self.checkpoints(TEXT_ONLY), LaterSteps(self.metrics, steps)
            phases.append(TrainerWork(training.text_only_trainer, store, self.state / "scratch-text-only", steps=later, metrics=metrics))
        return Phases(phases, training.loaded, "step")

    def publish(self, out: Path) -> None:
        from tribunal.oracle.training import publish

        runs = {name: self.checkpoints(name).newest() for name in ("oracle", TEXT_ONLY)}
        oracle, text_only = runs["oracle"], runs[TEXT_ONLY]
        assert oracle is not None and oracle.meta["finished"], "publish() before the training has finished"
        publish(
            self.training,
            out,
            oracle=oracle.path,
            text_only=text_only.path if text_only else None,
            rows=self.metrics.rows(),
            experiment=self.experiment.name,
        )


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("train_oracle")
