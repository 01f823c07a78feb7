"""Test payload: a walk of hashes that keeps its state in checkpoints, each written piece by piece over seconds."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import main
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import write_json
from tribunal.core.work import Checkpoints, Progress, Stop

PIECES = 100


class Config(Section):
    steps: int = 4
    seconds: float = 0.1
    save_seconds: float = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"steps": self.steps}


class Walk(Job[Config]):
    name = "walk"
    uses = ("seed",)
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=1)

    def build(self) -> Walking:
        return Walking(self.config, self.checkpoints("walk"))

    def publish(self, out: Path) -> None:
        newest = self.checkpoints("walk").newest()
        assert newest is not None and newest.meta["step"] == self.config.steps
        write_json(out / "end.json", newest.meta["place"])


class Walking:
    def __init__(self, config: Config, checkpoints: Checkpoints) -> None:
        self.config = config
        self.checkpoints = checkpoints
        newest = checkpoints.newest()
        self.state: dict[str, Any] = newest.meta if newest else {"step": 0, "place": ""}

    def run(self, stop: Stop) -> bool:
        while self.state["step"] < self.config.steps:
            time.sleep(self.config.seconds)
            step, place = self.state["step"] + 1, self.state["place"]
            self.state = {"step": step, "place": hashlib.sha256(f"{place}/{step}".encode()).hexdigest()}
            finished, asked, due = step == self.config.steps, stop.is_set(), stop.save_due()
            if finished or asked or due:
                self.checkpoints.save(self._write, self.state)
            if asked and not finished:
                return False
        return True

    def progress(self) -> Progress:
        return Progress(self.state["step"], self.config.steps, "step")

    def _write(self, folder: Path) -> None:
        with (folder / "state.bin").open("wb") as file:
            for _ in range(PIECES):
                file.write(os.urandom(4096))
                file.flush()
                time.sleep(self.config.save_seconds / PIECES)


if __name__ == "__main__":
    main("walk")
