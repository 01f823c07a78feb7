"""Test payload: twice each of count's numbers; the middle of a chain."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import main
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import read_json, write_json
from tribunal.core.work import OverItems, one_record


class Config(Section):
    factor: int = 2
    seconds: float = 0.05


class Double(Job[Config]):
    name = "double"
    needs = ("count",)
    uses = ("seed",)
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=1)

    def build(self) -> OverItems[int]:
        numbers = read_json(self.results_of(self.needs[0]) / "numbers.json")
        plan = list(range(len(numbers)))

        def process(i: int) -> dict[str, Any]:
            time.sleep(self.config.seconds)
            return {"value": self.config.factor * numbers[i]}

        return OverItems(plan, keys=lambda i: [str(i)], process=one_record(process, str), journal=self.journal, unit="number")

    def publish(self, out: Path) -> None:
        write_json(out / "numbers.json", [self.journal[str(i)]["value"] for i in range(len(self.journal))])


if __name__ == "__main__":
    main("double")
