"""Label every sentence of the traces: what it does, how much hangs on it, how near the answer is.

    python -m jobs.label_sentences experiments/demo.yaml [label_sentences.importance=rollouts]

Reads traces.jsonl and problems.jsonl (generate_traces), labels.jsonl (label_traces); writes sentences.jsonl and audit.json. The
oracle's tasks sentence_class, sentence_importance, answer_tracking and reasoning_summary are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tribunal.cluster.job import Job
from tribunal.core.config import Section, SlurmJob
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem, Trace, Verdict
from tribunal.core.storage import read_jsonl, write_json, write_jsonl
from tribunal.core.work import Json, OverItems, Stop, Work
from tribunal.models.judge import JudgeSettings
from tribunal.traces.sentence_labels import THIRDS, TIERS, RolloutSettings, SentenceLabel, TraceSentences, beyond_chance


class Config(Section):
    """Which labels are made, and how."""

    classes: Literal["rules", "judge", "none"] = Field("rules", description="who names what a sentence does")
    judge: JudgeSettings | None = Field(None, description="the judge model, for classes: judge")
    importance: Literal["suppression", "rollouts", "none"] = Field(
        "suppression", description="suppression: a forward pass per sentence; rollouts: resampling, some hundred times dearer"
    )
    rollouts: RolloutSettings = Field(RolloutSettings(), description="for importance: rollouts")
    track_answers: bool = Field(True, description="read off the trace's own answer at each sentence's end (logit lens)")
    lens_layer: int | None = Field(None, ge=0, description="0-based layer of the logit lens; default: three quarters of the way")
    verdicts: list[Verdict] = Field(["correct", "incorrect"], min_length=1, description="traces with one of these are labelled")
    samples_per_problem: int | None = Field(None, ge=1, description="label the first samples of each problem only")

    @model_validator(mode="after")
    def _judge_is_there(self) -> Config:
        if self.classes == "judge" and self.judge is None:
            raise ValueError("classes: judge needs a judge block, e.g. judge: {url: http://localhost:8000/v1, model: Qwen/Qwen3-32B}")
        if (self.classes, self.importance, self.track_answers) == ("none", "none", False):
            raise ValueError("nothing is to be labelled: classes and importance are none and track_answers is false")
        return self


class LabelSentences(Job[Config]):
    name = "label_sentences"
    needs = ("generate_traces", "label_traces")
    uses = ("model", "seed")
    shards = True
    only_if_read = True
    resources = SlurmJob(time="4:00:00", nodes=1, gpus=1, cpus=8, mem_gb=64)

    def check(self) -> None:
        from tribunal.models.describe import describe_model

        n_layers = describe_model(self.experiment.model).n_layers
        if self.config.lens_layer is not None and self.config.lens_layer >= n_layers:
            raise ConfigError(
                f"{self.experiment.path}: label_sentences.lens_layer: no layer {self.config.lens_layer}; "
                f"{self.experiment.model.name} has {n_layers} layers, 0 to {n_layers - 1}"
            )

    def build(self) -> Work:
        from tribunal.traces.sentence_labeller import SentenceLabeller

        traces, problems = self._traces(), self._problems()
        labeller = SentenceLabeller(
            self.experiment.model,
            seed=self.experiment.seed,
            classes=self.config.classes,
            judge=self.config.judge,
            importance=self.config.importance,
            rollouts=self.config.rollouts,
            track_answers=self.config.track_answers,
            lens_layer=self.config.lens_layer,
        )
        state = self.checkpoints(f"rollouts-{self.shard}")

        def process(number: int, stop: Stop) -> Iterator[Mapping[str, Json]]:
            [(trace, label)] = traces.read(range(number, number + 1))
            measured = labeller.measure(trace, label, _problem(problems, trace), stop, state)
            if measured is not None:
                yield {trace.key: measured}

        return OverItems(
            self.shard.mine(self._plan(traces)),
            keys=lambda number: [traces.key(number)],
            process=process,
            journal=self.journal,
            unit="trace",
        )

    def publish(self, out: Path) -> None:
        from tribunal.traces.importance import quantile_names, within_groups
        from tribunal.traces.sentence_audit import SentenceAudit

        traces = self._traces()
        keys = [traces.key(number) for number in self._plan(traces)]
        done = [key for key in keys if key in self.journal or key not in self.set_aside]
        if not done:
            raise DataError(f"{self.name}: every trace ended the process and was set aside; see tribunal logs")
        tiers = within_groups({key: _ranked(self.journal[key]) for key in done}, _problem_of, TIERS)
        audit = SentenceAudit()

        def rows() -> Iterator[TraceSentences]:
            for key in done:
                record = self.journal[key]
                columns = {**record, "tier": tiers[key], "answer_third": quantile_names(record["answer_logprob"], THIRDS)}
                sentences = [SentenceLabel(**dict(zip(columns, row))) for row in zip(*columns.values(), strict=True)]
                row = TraceSentences(problem_id=_problem_of(key), sample=int(key.rpartition("/")[2]), sentences=sentences)
                audit.see(row)
                yield row

        write_jsonl(out / "sentences.jsonl", rows())
        made: dict[str, Any] = {name: getattr(self.config, name) for name in ("classes", "importance", "track_answers")}
        write_json(out / "audit.json", audit.as_json(**made, set_aside=[key for key in keys if key not in done]))

    def _traces(self) -> Any:
        from tribunal.activations.plan import LabelledTraces

        folders = self.results_of("generate_traces"), self.results_of("label_traces")
        return LabelledTraces(folders[0] / "traces.jsonl", folders[1] / "labels.jsonl", self.config.verdicts)

    def _plan(self, traces: Any) -> list[int]:
        """Numbers of the traces that are labelled."""
        most = self.config.samples_per_problem
        seen: dict[str, int] = {}
        plan = []
        for number in range(len(traces)):
            problem = _problem_of(traces.key(number))
            seen[problem] = seen.get(problem, 0) + 1
            if most is None or seen[problem] <= most:
                plan.append(number)
        return plan

    def _problems(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in read_jsonl(self.results_of("generate_traces") / "problems.jsonl", Problem)}


def _ranked(record: Mapping[str, Any]) -> list[float | None]:
    """The importances that are ranked: none of a trace whose rollouts differ no more than by chance."""
    return record["importance"] if beyond_chance(record["importance_p"]) else [None] * len(record["importance"])


def _problem_of(key: str) -> str:
    return key.rpartition("/")[0]


def _problem(problems: Mapping[str, Problem], trace: Trace) -> Problem:
    if trace.problem_id not in problems:
        raise DataError(
            f"traces.jsonl has traces of problem '{trace.problem_id}', which is not in problems.jsonl; run generate_traces again"
        )
    return problems[trace.problem_id]


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("label_sentences")
