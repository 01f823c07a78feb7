"""One offline pass that keeps a single number per token: the projection on the direction that never saw the trace's problem.

Scores of whole traces, for ``monitor_traces``; a running generation is scored by ``tribunal.probes.monitor``, and both agree.

L tokens, D model width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from tribunal.activations.extraction import Extractor, Pair
from tribunal.activations.plan import LabelledTraces
from tribunal.core.errors import CorruptError, DataError
from tribunal.core.records import VERDICTS, Trace, TraceLabel
from tribunal.core.storage import link_or_copy, read_json, sha256_file, write_atomic
from tribunal.models.loading import LoadedModel
from tribunal.probes.direction import load
from tribunal.probes.held_out import HeldOut, read_held_out
from tribunal.probes.monitor import Monitor, running_logits

Json = dict[str, Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TENSOR = "projection"


@dataclass(frozen=True)
class Signal:
    """One trace and its running score.

    Attributes:
        label: 1 correct, 0 incorrect; None for a trace that the probes were not trained on (cut off, unparsable).
        logits_L: of "correct", after each readable token; by the direction without the trace's fold.
        logprobs_L: of each readable token, nats; None for imported traces that have none.
        ends_S: index of the last token of each sentence.
        known_S: tokens drawn by the time that end is known: the next sentence has begun.
        tokens: of the whole completion.
        file, start: where its projections are published, and from which row on.
    """

    problem_id: str
    sample: int
    verdict: str
    label: int | None
    stratum: str | None
    fold: int
    logits_L: Floats
    logprobs_L: Floats | None
    ends_S: Ints
    known_S: Ints
    tokens: int
    file: str
    start: int

    @property
    def length(self) -> int:
        return len(self.logits_L)


class SignalPass:
    """The plan of the pass, its units, and what they have left behind.

    Args:
        traces, labels, probes: result folders of generate_traces, label_traces and train_probes.
    Attributes:
        dropped: attempts that generate_traces left out to meet its targets.
    Raises:
        DataError: the probes were trained on other labels, or cannot be followed along a trace.
    """

    def __init__(self, *, traces: Path, labels: Path, probes: Path, traces_per_shard: int) -> None:
        self.traces = LabelledTraces(traces / "traces.jsonl", labels / "labels.jsonl", VERDICTS)
        self.held_out: HeldOut = read_held_out(probes)
        self.directions = load(probes)
        self.monitors = {entry.fold: Monitor(self.directions, entry.direction) for entry in self.held_out.file.folds}
        self.shards = self.traces.shards(traces_per_shard)
        summary = traces / "summary.json"
        self.dropped = int(read_json(summary).get("dropped", 0)) if summary.is_file() else 0

    @staticmethod
    def key(shard: range) -> str:
        return f"traces-{shard.start:06d}"

    @property
    def pooling(self) -> str:
        return self.held_out.place.pooling

    @property
    def planted(self) -> bool:
        return self.held_out.file.planted

    def scored(self, trace: Trace) -> bool:
        """Whether a direction without this trace's problem exists, and there is something to read."""
        return trace.problem_id in self.held_out.folds and trace.readable > 0

    def projector(self, loaded: LoadedModel, batch_tokens: int | None) -> Projector:
        """Raises ModelError when the directions do not belong to the model."""
        for monitor in self.monitors.values():
            monitor.require(loaded)
        return Projector(self, loaded, batch_tokens)

    def write(self, projector: Projector, shard: range, part: Path) -> Json:
        """One unit: project a shard's traces into ``part``; returns the record."""
        found = projector.project([pair for pair in self.traces.read(shard) if self.scored(pair[0])])
        content = np.concatenate(found) if found else np.empty(0, dtype=np.float32)
        write_atomic(part, save({TENSOR: content}))
        return {"file": part.name, "sha256": sha256_file(part), "tokens": len(content)}

    def publish(self, out: Path, records: Mapping[str, Json], parts: Path) -> list[str]:
        """Put the parts in place as signal-00000.safetensors ...; returns their names."""
        names = []
        for number, shard in enumerate(self.shards):
            if (record := records.get(self.key(shard))) is not None:
                self._check(parts / record["file"], record)
                names.append(_file_name(number))
                link_or_copy(parts / record["file"], out / names[-1])
        return names

    def signals(self, records: Mapping[str, Json], parts: Path) -> Iterator[Signal]:
        """Every scored trace of the finished shards, in the order of ``traces.jsonl``."""
        for number, shard in enumerate(self.shards):
            record = records.get(self.key(shard))
            if record is None:  # it was set aside
                continue
            self._check(parts / record["file"], record)
            projections = load_file(parts / record["file"])[TENSOR].astype(np.float64)
            start = 0
            for trace, label in self.traces.read(shard):
                if self.scored(trace):
                    yield self._signal(trace, label, projections[start : start + trace.readable], _file_name(number), start)
                    start += trace.readable

    def _signal(self, trace: Trace, label: TraceLabel, projections_L: Floats, file: str, start: int) -> Signal:
        known = self.held_out.labels.get((trace.problem_id, trace.sample))
        if known == (label.verdict != "correct"):
            raise DataError(
                f"{self.held_out.folder}: trace {trace.key} was {'in' * (not known)}correct for the probes and is {label.verdict} now; "
                "run train_probes again"
            )
        fold = self.held_out.fold_of(trace.problem_id)
        ends = [span.end_token for span in label.sentences]
        begun = [span.start_token + 1 for span in label.sentences[1:]]
        return Signal(
            problem_id=trace.problem_id,
            sample=trace.sample,
            verdict=label.verdict,
            label=known,
            stratum=label.stratum,
            fold=fold,
            logits_L=running_logits(projections_L, self.pooling, self.monitors[fold].direction.bias),
            logprobs_L=np.array(trace.logprobs[: trace.readable]) if len(trace.logprobs) >= trace.readable else None,
            ends_S=np.array(ends, dtype=np.int64) - 1,
            known_S=np.array([*begun, len(trace.completion_ids)][: len(ends)], dtype=np.int64),
            tokens=len(trace.completion_ids),
            file=file,
            start=start,
        )

    def _check(self, part: Path, record: Json) -> None:
        if not part.is_file() or sha256_file(part) != record["sha256"]:
            raise CorruptError(f"{part}: missing or damaged; remove the folder {part.parents[1]} and run monitor_traces again")


class Projector:
    """Runs traces through the model and projects each token's state; batches are a function of the traces alone."""

    def __init__(self, plan: SignalPass, loaded: LoadedModel, batch_tokens: int | None) -> None:
        self._plan = plan
        self._layer = plan.held_out.place.layer
        self._extractor = Extractor(
            loaded.model, layers=[self._layer], poolings=["token"], store_dtype="float32", batch_tokens=batch_tokens
        )

    def self_check(self, shard: range) -> None:
        """Compare the batched pass with a plain forward on a few traces; raises ModelError."""
        self._extractor.self_check([pair for pair in self._plan.traces.read(shard) if self._plan.scored(pair[0])])

    def project(self, pairs: Sequence[Pair]) -> list[NDArray[np.float32]]:
        """Projections of each trace's readable tokens on its own direction, [L] each.

        States are pooled in memory for one batch at a time, never for a shard.
        """
        found: dict[int, NDArray[np.float32]] = {}
        waiting = sorted(range(len(pairs)), key=lambda i: (-_length(pairs[i]), pairs[i][0].key))
        while waiting:
            batch = waiting[: max(1, self._extractor.batch_tokens // _length(pairs[waiting[0]]))]
            del waiting[: len(batch)]
            acts_LD = self._extractor.extract([pairs[i] for i in batch])[self._layer, "token"]
            start = 0
            for i in batch:
                trace = pairs[i][0]
                direction = self._plan.held_out.direction_of(trace.problem_id)
                logits_L = direction.logits(acts_LD[start : start + trace.readable])
                found[i] = (logits_L - direction.bias).astype(np.float32)
                start += trace.readable
        return [found[i] for i in range(len(pairs))]


def _file_name(shard: int) -> str:
    return f"signal-{shard:05d}.safetensors"


def _length(pair: Pair) -> int:
    return len(pair[0].prompt_ids) + pair[0].readable
