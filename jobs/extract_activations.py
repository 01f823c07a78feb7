"""Extract residual-stream activations for every labelled trace.

    python -m jobs.extract_activations experiments/gsm8k-qwen3-8b.yaml extract_activations.layers=[12,16]

Reads traces.jsonl (generate_traces) and labels.jsonl (label_traces); writes an ActivationSet: acts-00000.safetensors ...,
index.jsonl, activations.json (schemas in docs/files.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from tribunal.activations.poolings import POOLINGS
from tribunal.cluster.job import Job
from tribunal.core.config import Section
from tribunal.core.errors import ConfigError, CorruptError, DataError
from tribunal.core.records import Verdict
from tribunal.core.registry import nearest
from tribunal.core.storage import link_or_copy, sha256_file, write_file, write_json, write_jsonl
from tribunal.core.work import Json, OverItems, Work, one_record


class Config(Section):
    """Which residual streams to keep, and how."""

    layers: list[int] | Literal["all"] | None = Field(
        None, description="0-based blocks, or all; default: five evenly spaced, middle and last among them; layer 0 is always read too"
    )
    poolings: list[str] = Field(["last", "last_10", "mean", "prompt_end"], min_length=1, description=f"any of {', '.join(POOLINGS)}")
    verdicts: list[Verdict] = Field(["correct", "incorrect"], min_length=1, description="traces with one of these are read")
    store_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="of the stored rows; pooling is in float32")
    batch_tokens: int | None = Field(
        None, ge=1, description="tokens in a batch, padding included (it can change low bits); default: 512 on a CPU, 16384 on a GPU"
    )
    traces_per_shard: int = Field(256, ge=1, description="traces in one file, the unit that a stop can cost")
    backend: Literal["hooks", "transformer_lens"] = Field("hooks", description="transformer_lens: slower, needs a second copy of the model")

    @field_validator("poolings")
    @classmethod
    def _known(cls, poolings: list[str]) -> list[str]:
        for pooling in poolings:
            if pooling not in POOLINGS:
                raise ValueError(f"unknown pooling '{pooling}'; {nearest(pooling, POOLINGS)}")
        return list(dict.fromkeys(poolings))


class ShardPlan(NamedTuple):
    """One file's worth of traces: numbers into the labelled traces with a wanted verdict."""

    number: int
    traces: range

    @property
    def key(self) -> str:
        return f"acts-{self.number:05d}"


class ExtractActivations(Job[Config]):
    name = "extract_activations"
    needs = ("generate_traces", "label_traces")
    uses = ("model",)
    shards = True

    def check(self) -> None:
        from tribunal.models.describe import describe_model

        n_layers = describe_model(self.experiment.model).n_layers
        for layer in self.config.layers or ():
            if isinstance(layer, int) and not 0 <= layer < n_layers:
                raise ConfigError(
                    f"{self.experiment.path}: extract_activations.layers: no layer {layer}; "
                    f"{self.experiment.model.name} has {n_layers} layers, 0 to {n_layers - 1}"
                )

    def build(self) -> Work:
        from tribunal.activations.extraction import Extractor
        from tribunal.models.loading import identity, load_model

        traces = self._traces()
        mine = self.shard.mine(self._plan(traces))
        loaded = load_model(self.experiment.model)
        reader = None
        if self.config.backend == "transformer_lens":
            from tribunal.models.bridge import BridgeReader

            reader = BridgeReader(loaded.model)
        extractor = Extractor(
            loaded.model,
            layers=self.config.layers,
            poolings=self.config.poolings,
            store_dtype=self.config.store_dtype,
            batch_tokens=self.config.batch_tokens,
            reader=reader,
        )
        todo = [shard for shard in mine if shard.key not in self.journal]
        self.receipt_notes["oom_halvings"] = sum(self.journal[shard.key]["oom_halvings"] for shard in mine if shard.key in self.journal)
        if todo:
            extractor.self_check(traces.read(todo[0].traces))

        def process(shard: ShardPlan) -> Json:
            pairs = traces.read(shard.traces)
            path = self.parts / f"{shard.key}.{self.epoch}.safetensors"  # the epoch: a late writer harms nobody
            done: list[Any] = []
            write_file(path, lambda temporary: done.append(extractor.write_shard(temporary, pairs)))
            self.receipt_notes["oom_halvings"] += done[0].oom_halvings
            return {
                **done[0]._asdict(),
                "file": path.name,
                "sha256": sha256_file(path),
                "layers": extractor.layers,
                "d_model": extractor.d_model,
                "model": identity(loaded),
                "template_sha256": sorted({trace.template_sha256 for trace, _ in pairs}),
            }

        return OverItems(
            mine, keys=lambda shard: [shard.key], process=one_record(process, lambda shard: shard.key), journal=self.journal, unit="shard"
        )

    def publish(self, out: Path) -> None:
        from tribunal.activations.store import INDEX, META, Meta, ShardFile
        from tribunal.models.residual import hook_point

        traces = self._traces()
        plan = [shard for shard in self._plan(traces) if shard.key not in self.set_aside or shard.key in self.journal]
        records = {shard.key: self.journal[shard.key] for shard in plan}
        if not records:
            raise DataError(f"{self.name}: every shard ended the process and was set aside; see tribunal logs, and lower batch_tokens")
        for key, record in records.items():
            part = self.parts / record["file"]
            if not part.exists() or sha256_file(part) != record["sha256"]:
                raise CorruptError(f"{part}: missing or damaged; remove the folder {self.state} and run {self.name} again")
            link_or_copy(part, out / f"{key}.safetensors")
        write_jsonl(out / INDEX, self._index(plan, traces))
        absent: Counter[str] = Counter()
        for record in records.values():
            absent.update(record["absent"])
        first = next(iter(records.values()))
        meta = Meta(
            model=first["model"],
            layers=first["layers"],
            hook_points=[hook_point(layer) for layer in first["layers"]],
            poolings=self.config.poolings,
            d_model=first["d_model"],
            dtype=self.config.store_dtype,
            backend=self.config.backend,
            verdicts=list(self.config.verdicts),
            template_sha256=sorted({template for record in records.values() for template in record["template_sha256"]}),
            traces=sum(len(shard.traces) for shard in plan),
            absent={pooling: absent[pooling] for pooling in self.config.poolings},
            shards=[ShardFile(file=f"{key}.safetensors", sha256=record["sha256"], rows=record["rows"]) for key, record in records.items()],
        )
        write_json(out / META, meta.model_dump(mode="json"))

    def _traces(self) -> Any:
        from tribunal.activations.plan import LabelledTraces

        folders = self.results_of("generate_traces"), self.results_of("label_traces")
        return LabelledTraces(folders[0] / "traces.jsonl", folders[1] / "labels.jsonl", self.config.verdicts)

    def _plan(self, traces: Any) -> list[ShardPlan]:
        return [ShardPlan(number, numbers) for number, numbers in enumerate(traces.shards(self.config.traces_per_shard))]

    def _index(self, plan: Sequence[ShardPlan], traces: Any) -> Iterator[Json]:
        """Every row of every shard file, in order; one shard's traces are held at a time."""
        from tribunal.activations.poolings import spans

        for number, shard in enumerate(plan):
            pairs = traces.read(shard.traces)
            for pooling in self.config.poolings:
                row = 0
                for trace, label in pairs:
                    for span in spans(pooling, trace, label):
                        place = {"shard": number, "pooling": pooling, "row": row}
                        yield {**place, "problem_id": trace.problem_id, "sample": trace.sample, **span._asdict()}
                        row += 1


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("extract_activations")
