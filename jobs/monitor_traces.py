"""Score every trace while it is being written, as a monitor would: how early the score tells, and what giving up early buys.

    python -m jobs.monitor_traces experiments/gsm8k-qwen3-8b.yaml [monitor_traces.budgets=[1.2,2]]

Reads traces, labels and the probes of the folds; one pass over the traces keeps one number per token. Writes report.json,
monitor.png, early_exit.png, monitor.jsonl and signal-00000.safetensors ... (schemas in docs/files.md).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from tribunal.cluster.job import Job
from tribunal.core.config import Section
from tribunal.core.errors import DataError
from tribunal.core.work import Json, OverItems, Work, one_record

if TYPE_CHECKING:
    from tribunal.probes.trace_signals import SignalPass


class Config(Section):
    """Where along a trace the running score is measured, and at which costs early exit is."""

    percents: list[int] = Field(list(range(10, 101, 10)), min_length=1, description="shares of the trace, %")
    positions: list[int] | None = Field(
        None, min_length=1, description="token counts, measured among the traces alive there; default: ten, up to the 90th percentile"
    )
    budgets: list[float] = Field([1.25, 1.5, 2.0], min_length=1, description="tokens per answer, in units of one whole trace")
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")
    traces_per_shard: int = Field(256, ge=1, description="traces in one file, the unit that a stop can cost")
    batch_tokens: int | None = Field(None, ge=1, description="tokens in a batch, padding included; default: 512 on a CPU, 16384 on a GPU")

    @field_validator("percents")
    @classmethod
    def _shares(cls, values: list[int]) -> list[int]:
        if any(not 1 <= value <= 100 for value in values):
            raise ValueError("shares of a trace go from 1 to 100")
        return sorted({*values, 100})

    @field_validator("positions", "budgets")
    @classmethod
    def _at_least_one(cls, values: list[float] | None) -> list[float] | None:
        if values and any(value < 1 for value in values):
            raise ValueError("values start at 1 (the first token; the cost of one trace)")
        return sorted(set(values)) if values else values


class MonitorTraces(Job[Config]):
    name = "monitor_traces"
    needs = ("generate_traces", "label_traces", "train_probes")
    uses = ("model", "seed")
    shards = True

    @cached_property
    def signals(self) -> SignalPass:
        from tribunal.probes.trace_signals import SignalPass

        folders = {job: self.results_of(job) for job in self.needs}
        return SignalPass(
            traces=folders["generate_traces"],
            labels=folders["label_traces"],
            probes=folders["train_probes"],
            traces_per_shard=self.config.traces_per_shard,
        )

    def build(self) -> Work:
        from tribunal.models.loading import load_model

        mine = self.shard.mine(self.signals.shards)
        projector = self.signals.projector(load_model(self.experiment.model), self.config.batch_tokens)
        todo = [shard for shard in mine if self.signals.key(shard) not in self.journal]
        if todo:
            projector.self_check(todo[0])

        def process(shard: range) -> Json:
            part = self.parts / f"{self.signals.key(shard)}.{self.epoch}.safetensors"  # the epoch: a late writer harms nobody
            return self.signals.write(projector, shard, part)

        key = self.signals.key
        return OverItems(mine, keys=lambda shard: [key(shard)], process=one_record(process, key), journal=self.journal, unit="shard")

    def publish(self, out: Path) -> None:
        from tribunal.probes.monitor_report import publish

        records: dict[str, Json] = {key: self.journal[key] for key in map(self.signals.key, self.signals.shards) if key in self.journal}
        if not records:
            raise DataError(f"{self.name}: every shard ended the process and was set aside; see tribunal logs, and lower batch_tokens")
        publish(
            self.signals,
            out,
            records=records,
            parts=self.parts,
            settings=self.config.model_dump(),
            experiment=self.experiment.name,
            seed=self.experiment.seed,
        )


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("monitor_traces")
