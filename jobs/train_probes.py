"""Train probes for "will this trace's answer be correct?" on every layer and pooling, beside everything they must beat.

    python -m jobs.train_probes experiments/demo.yaml [train_probes.permutations=200]

Reads traces, labels and activations; writes report.json, implicit_value_directions.json, probe_results.png, and for later phases
the scores and directions that never saw a problem (schemas in docs/files.md). A unit is one control, or one layer x pooling with
all its probes and nulls.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from tribunal.cluster.job import Job
from tribunal.core.config import Section, SlurmJob
from tribunal.core.errors import DataError
from tribunal.core.work import Json, OverItems, Work, one_record

if TYPE_CHECKING:
    from tribunal.activations.store import ActivationSet
    from tribunal.probes.training import ProbeTraining


class Config(Section):
    """How probes are trained and judged."""

    kinds: list[Literal["logistic", "ridge", "diff_of_means"]] = Field(
        ["logistic", "ridge", "diff_of_means"], min_length=1, description="the first leads: layer and pooling are chosen among its probes"
    )
    folds: int = Field(5, ge=3, description="outer folds, by problem")
    c: list[float] = Field([0.001, 0.01, 0.1, 1.0], min_length=1, description="inverse penalties to choose from inside the folds")
    min_per_class: int = Field(20, ge=2, description="refuse to train with fewer correct or incorrect traces")
    truncated: Literal["leave_out", "incorrect"] = Field("leave_out", description="traces cut off by the token limit")
    rows_per_trace: int = Field(32, ge=1, description="of sentence and token rows, at most this many evenly spaced ones are used")
    permutations: int = Field(200, ge=0, description="label permutations within problems, ridge refitted for each")
    random_directions: int = Field(20, ge=0, description="random unit vectors scored on the same rows")
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")

    @field_validator("c")
    @classmethod
    def _positive(cls, values: list[float]) -> list[float]:
        if any(value <= 0 for value in values):
            raise ValueError("inverse penalties must be above 0")
        return sorted(set(values))

    @field_validator("kinds")
    @classmethod
    def _once(cls, kinds: list[str]) -> list[str]:
        return list(dict.fromkeys(kinds))


class Unit(NamedTuple):
    """One control, or one layer x pooling."""

    control: str | None
    layer: int = -1
    pooling: str = ""

    @property
    def key(self) -> str:
        return f"control/{self.control}" if self.control else f"layer_{self.layer}/{self.pooling}"


class TrainProbes(Job[Config]):
    name = "train_probes"
    needs = ("generate_traces", "label_traces", "extract_activations")
    uses = ("model", "dataset", "seed")
    shards = True
    resources = SlurmJob(time="1:00:00", nodes=1, gpus=0, cpus=8, mem_gb=64)

    @cached_property
    def training(self) -> ProbeTraining:
        from tribunal.probes.training import ProbeTraining

        folders = {job: self.results_of(job) for job in self.needs}
        return ProbeTraining(
            traces=folders["generate_traces"],
            labels=folders["label_traces"],
            activations=folders["extract_activations"],
            settings=self.config.model_dump(),
            seed=self.experiment.seed,
        )

    def plan(self) -> list[Unit]:
        acts: ActivationSet = self.training.activations
        cells = [Unit(None, layer, pooling) for pooling in self.training.poolings for layer in acts.layers]
        return [*(Unit(control) for control in self.training.controls), *cells]

    def build(self) -> Work:
        mine = self.shard.mine(self.plan())

        def process(unit: Unit) -> Json:
            name = f"{unit.key.replace('/', '.')}.{self.epoch}.safetensors"  # the epoch: a late writer harms nobody
            if unit.control:
                return self.training.fit_control(unit.control, self.parts / name)
            return self.training.fit_cell(unit.layer, unit.pooling, self.parts / name)

        one = one_record(process, lambda unit: unit.key)
        return OverItems(mine, keys=lambda unit: [unit.key], process=one, journal=self.journal, unit="probe")

    def publish(self, out: Path) -> None:
        from tribunal.probes.training import publish

        records: dict[str, Json] = {unit.key: self.journal[unit.key] for unit in self.plan() if unit.key in self.journal}
        missing = [unit.control for unit in self.plan() if unit.control and unit.key not in records]
        if missing:
            raise DataError(
                f"{self.name}: the control {missing[0]} ended the process and was set aside; no probe is reported without it: "
                f"see tribunal logs, then remove {self.state} and run it again, with more memory"
            )
        publish(
            self.training,
            out,
            records=records,
            parts=self.parts,
            experiment=self.experiment.name,
            dataset=_dataset(self.experiment.dataset.model_dump(mode="json")),
            dtype=self.experiment.model.dtype,
            planted=self.experiment.model.name.startswith("builtin:"),
        )


def _dataset(block: dict[str, Any]) -> dict[str, Any]:
    """The dataset block without a path of this machine."""
    return {key: value for key, value in block.items() if key != "path" and value is not None}


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("train_probes")
