"""Label every trace: correct, incorrect, unparsable or truncated; find its sentences; audit the labels.

    python -m jobs.label_traces experiments/demo.yaml [label_traces.min_per_class=50]

Reads traces.jsonl and problems.jsonl (generate_traces); writes labels.jsonl (in their order) and audit.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from tribunal.cluster.job import Job
from tribunal.core.config import NO_EFFECT_ON_RESULTS, Section, SlurmJob
from tribunal.core.errors import DataError
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.storage import read_jsonl, write_json, write_jsonl
from tribunal.core.work import Json, OverItems, Stop, Work
from tribunal.traces import audit
from tribunal.traces.files import TraceFile
from tribunal.traces.labels import Labeller


class Config(Section):
    """How labels are checked; the grading itself has no settings."""

    min_per_class: int = Field(
        20, ge=0, description="refuse to go on with fewer correct or fewer incorrect traces", json_schema_extra=NO_EFFECT_ON_RESULTS
    )
    cross_check: int = Field(
        100, ge=0, description="traces that math-verify grades a second time for audit.json (those with a numeric gold)"
    )
    chunk: int = Field(64, ge=1, description="labels made durable together", json_schema_extra=NO_EFFECT_ON_RESULTS)


class LabelTraces(Job[Config]):
    name = "label_traces"
    needs = ("generate_traces",)
    uses = ("model",)
    shards = True
    resources = SlurmJob(time="1:00:00", nodes=1, gpus=0, cpus=2, mem_gb=16)

    def build(self) -> Work:
        from tribunal.models.describe import load_format

        traces, problems = self._traces(), self._problems()
        text_format, _ = load_format(self.experiment.model)
        labeller = Labeller(text_format.decode, text_format.tags or ())

        def process(chunk: range, stop: Stop) -> Iterator[Mapping[str, Json]]:
            done: dict[str, Json] = {}
            for trace in traces.read(number for number in chunk if traces.keys[number] not in self.journal):
                if done and stop.is_set():  # before the first one of a chunk, OverItems has looked
                    break
                done[trace.key] = labeller.label(trace, _problem(problems, trace.problem_id)).model_dump(mode="json")
            yield done

        size = self.config.chunk
        chunks = [range(start, min(start + size, len(traces))) for start in range(0, len(traces), size)]
        return OverItems(
            self.shard.mine(chunks),
            keys=lambda chunk: traces.keys[chunk.start : chunk.stop],
            process=process,
            journal=self.journal,
            unit="trace",
        )

    def publish(self, out: Path) -> None:
        traces, problems = self._traces(), self._problems()
        rows: list[audit.Facts] = []

        def labels() -> Iterator[TraceLabel]:
            for trace in traces.read(range(len(traces))):
                label = self._label(trace, problems)
                rows.append(audit.facts(trace, label))
                yield label

        write_jsonl(out / "labels.jsonl", labels())
        audit.require_both_classes(rows, self.config.min_per_class)
        graders = None
        if self.config.cross_check:
            spread = range(0, len(traces), -(-len(traces) // self.config.cross_check))
            graders = audit.cross_check((t, _problem(problems, t.problem_id), self._label(t, problems)) for t in traces.read(spread))
        write_json(out / "audit.json", audit.audit(rows, graders))

    def _label(self, trace: Trace, problems: Mapping[str, Problem]) -> TraceLabel:
        """A trace that was set aside (grading it ended the process, twice) has no answer that can be read."""
        if trace.key not in self.journal and trace.key in self.set_aside:
            problem = _problem(problems, trace.problem_id)
            return TraceLabel(
                problem_id=trace.problem_id,
                sample=trace.sample,
                verdict="unparsable",
                answer=None,
                gold=problem.answer,
                stratum=problem.stratum,
                sentences=[],
            )
        return TraceLabel.model_validate(self.journal[trace.key])

    def _traces(self) -> TraceFile:
        return TraceFile(self.results_of("generate_traces") / "traces.jsonl")

    def _problems(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in read_jsonl(self.results_of("generate_traces") / "problems.jsonl", Problem)}


def _problem(problems: Mapping[str, Problem], identity: str) -> Problem:
    if identity not in problems:
        raise DataError(f"traces.jsonl has traces of problem '{identity}', which is not in problems.jsonl; run generate_traces again")
    return problems[identity]


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("label_traces")
