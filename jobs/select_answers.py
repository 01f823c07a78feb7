"""Choose among a problem's samples by the probe, beside majority vote, log-probability, length, a random one and an oracle.

    python -m jobs.select_answers experiments/demo.yaml [select_answers.n=4]

Reads traces, labels and the held-out scores of train_probes; writes report.json and selection.png (schemas in docs/files.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tribunal.cluster.job import Job
from tribunal.core.config import NO_EFFECT_ON_RESULTS, Section, SlurmJob
from tribunal.core.errors import DataError
from tribunal.core.work import Json, OverItems, Stop, Work

if TYPE_CHECKING:
    from tribunal.probes.selection import Candidates


class Config(Section):
    """How many samples to choose among, and how votes are averaged."""

    n: int | None = Field(None, ge=2, description="samples to choose among, at most; default: as many as most problems have")
    subsets: int = Field(
        20_000,
        ge=100,
        description="votes are averaged over all subsets of N of a problem's samples; where there are more, over so many drawn ones",
    )
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")
    chunk: int = Field(32, ge=1, description="problems made durable together", json_schema_extra=NO_EFFECT_ON_RESULTS)


class SelectAnswers(Job[Config]):
    name = "select_answers"
    needs = ("generate_traces", "label_traces", "train_probes")
    uses = ("seed",)
    shards = True
    resources = SlurmJob(time="1:00:00", nodes=1, gpus=0, cpus=2, mem_gb=16)

    @cached_property
    def candidates(self) -> Candidates:
        from tribunal.probes.held_out import read_held_out
        from tribunal.probes.selection import Candidates

        return Candidates(
            traces=self.results_of("generate_traces"),
            labels=self.results_of("label_traces"),
            held_out=read_held_out(self.results_of("train_probes")),
            n=self.config.n,
            subsets=self.config.subsets,
            seed=self.experiment.seed,
        )

    def build(self) -> Work:
        problems, size = self.candidates.problems, self.config.chunk

        def process(chunk: list[str], stop: Stop) -> Iterator[Mapping[str, Json]]:
            waiting = [problem for problem in chunk if problem not in self.journal and problem not in self.set_aside]
            return self.candidates.measure(waiting, stop)

        chunks = [problems[start : start + size] for start in range(0, len(problems), size)]
        return OverItems(self.shard.mine(chunks), keys=lambda chunk: chunk, process=process, journal=self.journal, unit="problem")

    def publish(self, out: Path) -> None:
        from tribunal.probes.selection_report import publish

        records = {problem: self.journal[problem] for problem in self.candidates.problems if problem in self.journal}
        if not records:
            raise DataError(f"{self.name}: every problem ended the process and was set aside; there is nothing to report")
        publish(self.candidates, records, out, experiment=self.experiment.name, resamples=self.config.bootstrap)


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("select_answers")
