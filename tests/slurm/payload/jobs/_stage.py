"""Three small stages, each reading the one before: what a pipeline of jobs looks like to SLURM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import read_json, write_json
from tribunal.core.work import OverItems, Stop


class StageConfig(Section):
    units: int = 20
    seconds: float = 0.1
    wait_for: dict[str, Path] = {}
    fail_in_build: bool = False

    def fingerprint(self) -> dict[str, Any]:
        return {"units": self.units}


class Stage(Job[StageConfig]):
    uses = ("seed",)
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=1)

    def build(self) -> OverItems[int]:
        if self.config.fail_in_build:
            raise RuntimeError("this stage is broken")
        before = [read_json(self.results_of(name) / "numbers.json") for name in self.needs]

        def process(i: int, stop: Stop) -> Any:
            gate = self.config.wait_for.get(str(i))
            while gate is not None and not gate.exists():
                if stop.is_set():
                    return
                time.sleep(0.02)
            time.sleep(self.config.seconds)
            yield {str(i): {"value": i + sum(numbers[i] for numbers in before)}}

        plan = range(self.config.units)
        return OverItems(plan, keys=lambda i: [str(i)], process=process, journal=self.journal, unit="number")

    def publish(self, out: Path) -> None:
        write_json(out / "numbers.json", [self.journal[str(i)]["value"] for i in range(self.config.units)])
