"""Train a probe on one difficulty, position, layer or experiment and test it on another, every entry held out by problem.

    python -m jobs.transfer_probes experiments/demo.yaml [transfer_probes.others=[gsm8k-qwen3-8b]]

Reads traces, labels, activations and train_probes (whose settings and best layer and pooling it takes), and those of other
experiments; writes report.json and transfer.png (schemas in docs/files.md). A unit is one kind of rows trained on.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from tribunal.cluster.job import Job, root
from tribunal.core import receipts
from tribunal.core.config import Section, SlurmJob
from tribunal.core.errors import ConfigError
from tribunal.core.work import Json, OverItems, Work, one_record

if TYPE_CHECKING:
    from tribunal.probes.training import ProbeTraining
    from tribunal.probes.transfer import Kind, Matrix, Transfer

READ = ("generate_traces", "label_traces", "extract_activations")


class Config(Section):
    """What else to train and test on; folds, penalties and rows are those of train_probes."""

    others: list[str] = Field(
        [], description="other experiments to train and test on: names under results/, or paths to their results folder"
    )
    layer: int | None = Field(None, ge=0, description="default: the best of train_probes")
    pooling: str | None = Field(None, description="default: the best of train_probes")
    permutations: int = Field(100, ge=0, description="label permutations within problems, ridge refitted for each")
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")

    @field_validator("others")
    @classmethod
    def _once(cls, others: list[str]) -> list[str]:
        names = [Path(other).name for other in others]
        if len(set(names)) < len(names):
            raise ValueError(f"two experiments of the same name: {', '.join(sorted(names))}")
        return others


class TransferProbes(Job[Config]):
    name = "transfer_probes"
    needs = (*READ, "train_probes")
    uses = ("seed",)
    shards = True
    resources = SlurmJob(time="2:00:00", nodes=1, gpus=0, cpus=8, mem_gb=64)

    def check(self) -> None:
        for other, folder in self.others.items():
            if folder.resolve() == self.results.parent.resolve():
                raise ConfigError(f"{self.experiment.path}: transfer_probes.others: '{other}' is this experiment; name another one")
            if not folder.is_dir():
                there = ", ".join(sorted(path.name for path in (root() / "results").glob("*") if path.is_dir())) or "nothing"
                raise ConfigError(
                    f"{self.experiment.path}: transfer_probes.others: no results of '{other}' ({folder}); under results/ there is {there}"
                )
            for job in READ:
                receipts.require(folder / job, self.name)

    def fingerprint(self) -> Json:
        values = super().fingerprint()
        for name, folder in self.others.items():
            for job in READ:
                receipt = receipts.read_receipt(folder / job)
                values["inputs"][f"../{name}/{job}"] = receipt["digest"] if receipt else None
        return values

    @property
    def others(self) -> dict[str, Path]:
        """Results folders of the other experiments, by name."""
        places = {other: root() / "results" / other for other in self.config.others}
        return {Path(other).name: place if place.is_dir() else Path(other) for other, place in places.items()}

    @cached_property
    def transfer(self) -> Transfer:
        from tribunal.probes.held_out import read_held_out
        from tribunal.probes.transfer import Transfer

        self.check()
        place = read_held_out(self.results_of("train_probes")).place
        chosen = {name: value for name in ("layer", "pooling") if (value := getattr(self.config, name)) is not None}
        return Transfer(
            self.experiment.name,
            self._training({job: self.results_of(job) for job in READ}),
            {name: self._training({job: folder / job for job in READ}) for name, folder in self.others.items()},
            place.model_copy(update=chosen),
            permutations=self.config.permutations,
        )

    def _training(self, folders: dict[str, Path]) -> ProbeTraining:
        from tribunal.probes.training import ProbeTraining

        return ProbeTraining(
            traces=folders["generate_traces"],
            labels=folders["label_traces"],
            activations=folders["extract_activations"],
            settings=self._probes["train_probes"],
            seed=self.experiment.seed,
        )

    @cached_property
    def _probes(self) -> dict[str, Any]:
        """The configuration that train_probes ran with."""
        config: dict[str, Any] = receipts.require(self.results_of("train_probes"), self.name)["config"]
        return config

    def plan(self) -> list[tuple[Matrix, Kind]]:
        return [(matrix, kind) for matrix in self.transfer.matrices for kind in matrix.kinds]

    def build(self) -> Work:
        numbers = {item[0].key(item[1]): number for number, item in enumerate(self.plan())}

        def process(item: tuple[Matrix, Kind]) -> Json:
            name = f"row-{numbers[key(item)]:03d}"  # a number: a stratum may be called anything
            return self.transfer.fit_row(*item, self.parts / f"{name}.{self.epoch}.safetensors")  # the epoch: a late writer harms nobody

        def key(item: tuple[Matrix, Kind]) -> str:
            return item[0].key(item[1])

        mine = self.shard.mine(self.plan())
        return OverItems(mine, keys=lambda item: [key(item)], process=one_record(process, key), journal=self.journal, unit="row")

    def publish(self, out: Path) -> None:
        from tribunal.probes.transfer_report import publish

        keys = [matrix.key(kind) for matrix, kind in self.plan()]
        publish(
            self.transfer,
            {key: self.journal[key] for key in keys if key in self.journal},
            out,
            parts=self.parts,
            experiment=self.experiment.name,
            resamples=self.config.bootstrap,
            planted=self.transfer.planted,
        )


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("transfer_probes")
