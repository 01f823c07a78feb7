"""A torch-free job for the tests of the core: counts through a seeded walk, one number per unit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tribunal.cluster.job import Job, Shard
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, Section, SlurmConfig
from tribunal.core.storage import sha256_file, write_atomic, write_json
from tribunal.core.work import OverItems, one_record


class Config(Section):
    units: int = 8
    factor: int = 3


class Toy(Job[Config]):
    name = "toy"
    shards = True

    def build(self) -> OverItems[int]:
        plan = self.shard.mine(range(self.config.units))
        return OverItems(plan, keys=lambda i: [str(i)], process=one_record(self._square, str), journal=self.journal, unit="number")

    def publish(self, out: Path) -> None:
        records = [self.journal[str(i)] for i in range(self.config.units)]
        for record in records:
            assert sha256_file(self.parts / record["file"]) == record["sha256"]
        write_json(out / "numbers.json", [record["value"] for record in records])

    def _square(self, i: int) -> dict:
        path = self.parts / f"{i}.txt"
        write_atomic(path, hashlib.sha256(f"{self.experiment.seed}/{i}".encode()).hexdigest())
        return {"value": i * self.config.factor, "file": path.name, "sha256": sha256_file(path)}


def toy_experiment(**values: int) -> Experiment:
    return Experiment(
        name="toys",
        path=Path("toys.yaml"),
        seed=0,
        model=ModelConfig(name="none"),
        dataset=DatasetConfig(name="none"),
        slurm=SlurmConfig(),
        sections={"toy": Config(**values)},
        given=frozenset({"toy"}),
    )


def toy(shard: Shard | None = None, **values: int) -> Toy:
    return Toy(toy_experiment(**values), shard)
