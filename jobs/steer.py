"""Steer the model along its probe's direction, beside random directions of equal length, and grade what comes out.

    python -m jobs.steer experiments/gsm8k-qwen3-8b.yaml [steer.strengths=[0.1,0.3,1.0]]

Reads traces, labels and train_probes' directions; writes report.json, steering.jsonl and steering.png (schemas in
docs/files.md). A unit is one completion.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from tribunal.cluster.job import Job
from tribunal.core.config import NO_EFFECT_ON_RESULTS, Section
from tribunal.core.errors import ConfigError
from tribunal.core.work import OverItems, Work

if TYPE_CHECKING:
    from tribunal.probes.steering import SteeringRun

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k")


class Config(Section):
    """What is steered, how, and how strongly. Slots and wave size decide batch shapes, hence (in the last bits) the text."""

    layer: int | None = Field(None, ge=0, description="of the direction; default: layer, pooling and kind of train_probes' headline")
    pooling: str | None = Field(None, description="of the direction; default as above. Another place has no direction for each fold")
    kind: Literal["logistic", "ridge", "diff_of_means"] | None = Field(None, description="of the direction; default as above")
    traces_per_class: int = Field(100, ge=1, description="wrong traces, and right ones, that are steered; one of each problem")
    draws: int = Field(1, ge=1, description="completions of each trace under each condition")
    start: list[Literal["prompt", "middle"]] = Field(
        ["prompt", "middle"], min_length=1, description="steer from the prompt on, or keep the trace up to a sentence end near its middle"
    )
    strengths: list[float] = Field(
        [0.1, 0.3, 1.0], min_length=1, description="lengths of what is added, in mean residual lengths at the layer; both signs are tried"
    )
    random_directions: int = Field(20, ge=20, description="random directions beside every condition, of equal length")
    project_out: bool = Field(True, description="also take the direction out of every state")
    adaptive_strengths: list[float] = Field([0.3], description="also add these where the probe's signal is low, and only there")
    adaptive_percentile: float = Field(25.0, gt=0, lt=100, description="low: below this percentile of the signals in right traces' tokens")
    upstream_layers: list[int] = Field([], description="add the same direction after these earlier blocks, too")
    calibration_traces: int = Field(32, ge=1, description="right traces from which residual lengths and the percentile are taken")
    max_new_tokens: int | None = Field(None, ge=1, description="of a whole completion; default: as generate_traces")
    temperature: float | None = Field(None, ge=0, description="default: as generate_traces, like the next two")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    slots: int = Field(64, ge=1, description="completions in flight per GPU; the key-value cache grows with it")
    wave_size: int = Field(256, ge=1, description="completions that are sampled as one queue; a multiple of slots keeps them full")
    max_cache_gb: float = Field(
        16.0,
        ge=0,
        description="a key-value cache above this is not saved on a stop but computed again",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")

    @field_validator("strengths", "adaptive_strengths")
    @classmethod
    def _positive(cls, values: list[float]) -> list[float]:
        if any(value <= 0 for value in values):
            raise ValueError("strengths must be above 0; both signs are tried anyway")
        return sorted(set(values))

    @field_validator("start", "upstream_layers")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        return list(dict.fromkeys(values))


class Steer(Job[Config]):
    name = "steer"
    needs = ("generate_traces", "label_traces", "train_probes")
    uses = ("model", "seed")
    shards = True

    def check(self) -> None:
        from tribunal.models.describe import describe_model

        n_layers = describe_model(self.experiment.model).n_layers
        for layer in (self.config.layer, *self.config.upstream_layers):
            if layer is not None and not 0 <= layer < n_layers:
                name = self.experiment.model.name
                raise ConfigError(f"{self.experiment.path}: steer: no layer {layer}; {name} has {n_layers} layers, 0 to {n_layers - 1}")

    @cached_property
    def steering(self) -> SteeringRun:
        from tribunal.probes.steering import SteeringRun
        from tribunal.traces.sampling import sampled_with

        traces, labels, probes = (self.results_of(job) for job in self.needs)
        sampled = sampled_with(traces)
        given = self.config.model_dump()
        settings = given | {name: sampled[name] for name in SAMPLING if given[name] is None}
        return SteeringRun(traces=traces, labels=labels, probes=probes, settings=settings, seed=self.experiment.seed)

    def build(self) -> Work:
        from tribunal.models.loading import load_model

        sampling = self.steering.sampling(load_model(self.experiment.model), self.checkpoints(f"wave-{self.shard}"))
        mine = self.shard.mine(self.steering.waves())
        return OverItems(
            mine, keys=lambda wave: [attempt.key for attempt in wave], process=sampling, journal=self.journal, unit="completion"
        )

    def publish(self, out: Path) -> None:
        from tribunal.probes.steering_report import publish

        self.journal.refresh()
        publish(self.steering, self.journal, out, experiment=self.experiment.name)


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("steer")
