"""Say which heads and MLPs write the probe's signal, and what is lost without them.

    python -m jobs.attribute_direction experiments/gsm8k-qwen3-8b.yaml [attribute_direction.top=10]

Reads the results of the calibration; writes report.json, contributions.jsonl, attribution.png (schemas in docs/files.md).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tribunal.cluster.job import Job
from tribunal.core import receipts
from tribunal.core.config import Section
from tribunal.core.work import OverItems, Work

if TYPE_CHECKING:
    from tribunal.probes.attribution import Inputs


class Config(Section):
    """How many traces are read, and what is ablated."""

    traces: int = Field(400, ge=8, description="traces that are read, half right and half wrong; half of the problems rank, half measure")
    top: int = Field(3, ge=1, description="heads and MLPs with the largest part of the gap, ablated together")
    random_sets: int = Field(10, ge=2, description="random sets of as many other components, each ablated in turn")
    random_directions: int = Field(20, ge=2, description="random directions of equal length along which the same gap is read")
    problems: int = Field(40, ge=1, description="problems that are answered anew under every ablation")
    samples: int = Field(2, ge=1, description="answers of each problem under every ablation; the same draws for all")
    batch_tokens: int | None = Field(None, ge=1, description="tokens in a batch, padding included; default: 512 on a CPU, 16384 on a GPU")
    slots: int = Field(64, ge=1, description="answers in flight")
    bootstrap: int = Field(1000, ge=100, description="resamples of problems behind every interval")


class AttributeDirection(Job[Config]):
    name = "attribute_direction"
    needs = ("generate_traces", "label_traces", "train_probes")
    uses = ("model", "seed")

    @cached_property
    def material(self) -> Inputs:
        from tribunal.probes.attribution import Settings, read_inputs
        from tribunal.probes.held_out import read_held_out

        return read_inputs(
            traces=self.results_of("generate_traces"),
            labels=self.results_of("label_traces"),
            held_out=read_held_out(self.results_of("train_probes")),
            settings=Settings(**self.config.model_dump(exclude={"bootstrap"})),
            seed=self.experiment.seed,
            rows_per_trace=receipts.require(self.results_of("train_probes"), self.name)["config"]["train_probes"]["rows_per_trace"],
        )

    def build(self) -> Work:
        from tribunal.models.loading import load_model
        from tribunal.probes.attribution import Attribution
        from tribunal.traces.sampling import sampled_with

        attribution = Attribution(
            self.material,
            load_model(self.experiment.model),
            self.journal,
            parts=self.parts,
            epoch=self.epoch,
            sampling=sampled_with(self.results_of("generate_traces")),
            checkpoints=self.checkpoints("wave"),
        )
        plan = self.material.plan()
        return OverItems(plan, keys=lambda item: item.keys, process=attribution.process, journal=self.journal, unit="reading")

    def publish(self, out: Path) -> None:
        from tribunal.probes.attribution import components_of, gather
        from tribunal.probes.attribution_report import Findings

        gathered = gather(self.material, self.journal, self.parts)
        components = components_of(self.material, self.journal)
        findings = Findings(self.material, gathered, components, self.journal, bootstrap=self.config.bootstrap)
        findings.publish(out, experiment=self.experiment.name, planted=self.experiment.model.name.startswith("builtin:"))


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("attribute_direction")
