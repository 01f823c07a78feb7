"""Test payload: the sum of double's numbers; the end of a chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import main
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import read_json, write_json
from tribunal.core.work import OverItems, one_record


class Config(Section):
    pass


class Gather(Job[Config]):
    name = "gather"
    needs = ("double",)
    uses = ("seed",)
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=1)

    def build(self) -> OverItems[str]:
        numbers = read_json(self.results_of("double") / "numbers.json")

        def process(_: str) -> dict[str, Any]:
            return {"sum": sum(numbers)}

        return OverItems(["sum"], keys=lambda name: [name], process=one_record(process, str), journal=self.journal, unit="sum")

    def publish(self, out: Path) -> None:
        write_json(out / "sum.json", self.journal["sum"])


if __name__ == "__main__":
    main("gather")
