"""Test payload: one number per unit, in a file of its own; slow, failing or deadly where the experiment says so.

It stands in for an item job (traces, activations): PYTHONPATH puts this folder's ``jobs`` before the project's.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import main
from tribunal.core.config import Section, SlurmJob
from tribunal.core.storage import sha256_file, write_atomic, write_json
from tribunal.core.work import OverItems, Stop


class Config(Section):
    units: int = 40
    seconds: float = 0.1
    wait_for: dict[str, Path] = {}
    fail_in: str | None = None
    fail_in_build: bool = False
    die_in: str | None = None
    slow_import: Path | None = None
    kilobytes: int = 0
    stubborn: float = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"units": self.units}


class Count(Job[Config]):
    name = "count"
    shards = True
    uses = ("seed",)
    resources = SlurmJob(time="0:10:00", nodes=1, gpus=0, cpus=1, mem_gb=1)

    def build(self) -> OverItems[int]:
        if self.config.slow_import is not None:  # a heavy import: whoever deletes the file has seen it begin
            self.config.slow_import.touch()
            _until(lambda: not (self.config.slow_import or Path()).exists())
        if self.config.fail_in_build:
            raise RuntimeError(f"no such layer: {os.getpid()}")
        plan = self.shard.mine(range(self.config.units))
        return OverItems(plan, keys=lambda i: [str(i)], process=self._process, journal=self.journal, unit="number")

    def publish(self, out: Path) -> None:
        keys = [str(i) for i in range(self.config.units) if str(i) not in self.set_aside]
        records = [self.journal[key] for key in keys]
        for record in records:
            assert sha256_file(self.parts / record["file"]) == record["sha256"]
        write_json(out / "numbers.json", [record["value"] for record in records])

    def _process(self, i: int, stop: Stop) -> Iterator[Mapping[str, dict[str, Any]]]:
        config = self.config
        if config.fail_in == str(i):
            raise ValueError(f"unit {i} is poison")
        if config.die_in == str(i):
            os.kill(os.getpid(), signal.SIGKILL)
        if config.stubborn and str(i) in config.wait_for:
            _until(config.wait_for[str(i)].exists, config.stubborn)  # looks at nothing else, as one long call would
        if (gate := config.wait_for.get(str(i))) is not None:
            _until(lambda: gate.exists() or stop.is_set())
            if stop.is_set():
                return
        time.sleep(config.seconds)
        if config.kilobytes:
            write_atomic(self.parts / f"{i}.filling", os.urandom(1024 * config.kilobytes))
        path = self.parts / f"{i}.txt"
        write_atomic(path, hashlib.sha256(f"{self.experiment.seed}/{i}".encode()).hexdigest())
        yield {str(i): {"value": 3 * i, "file": path.name, "sha256": sha256_file(path)}}


def _until(met: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not met() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main("count")
