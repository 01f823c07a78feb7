"""Sample reasoning traces from the model, or import existing ones.

    python -m jobs.generate_traces experiments/gsm8k-qwen3-8b.yaml [generate_traces.samples_per_problem=8]

Writes traces.jsonl and problems.jsonl in the plan's fixed order, and summary.json (schemas in docs/files.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tribunal.cluster.job import Job
from tribunal.core.config import NO_EFFECT_ON_RESULTS, Section
from tribunal.core.errors import ConfigError
from tribunal.core.records import Problem, Trace
from tribunal.core.storage import sha256_file, write_json, write_jsonl
from tribunal.core.work import Json, OverItems, Stop, Work

if TYPE_CHECKING:
    from tribunal.traces.sampling import Attempt, Selection

log = logging.getLogger(__name__)


class Config(Section):
    """How traces are sampled. Slots and wave size decide batch shapes, hence (in the last bits) the traces."""

    samples_per_problem: int = Field(
        4, ge=1, description="traces of each problem; 4 or more let right and wrong be compared within a problem"
    )
    temperature: float = Field(1.0, ge=0, description="softmax temperature; 1.0 keeps the model's own distribution, 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of tokens with this probability; 1.0 keeps all")
    top_k: int = Field(0, ge=0, description="this many most likely tokens; 0 keeps all")
    max_new_tokens: int = Field(4096, ge=1, description="tokens of a completion; so many that fewer than 2 % are cut off")
    target_correct: int | None = Field(
        None, ge=1, description="stop when there are this many correct traces; default: sample the whole plan"
    )
    target_incorrect: int | None = Field(None, ge=1, description="the same for incorrect ones; with both given, both must be met")
    max_attempts: int | None = Field(None, ge=1, description="at most this many traces are sampled; default: all samples of all problems")
    slots: int = Field(64, ge=1, description="traces in flight per GPU; the key-value cache grows with it")
    wave_size: int = Field(256, ge=1, description="traces that are sampled as one queue; a multiple of slots keeps them full")
    max_cache_gb: float = Field(
        16.0,
        ge=0,
        description="a key-value cache above this is not saved on a stop but computed again",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )
    import_path: Path | None = Field(None, description="JSONL of existing traces to take instead of sampling")


class GenerateTraces(Job[Config]):
    name = "generate_traces"
    shards = True

    def check(self) -> None:
        from tribunal.models.describe import load_format

        where, config = f"{self.experiment.path}: generate_traces", self.config
        attempts = self._attempts()
        wanted = (config.target_correct or 0) + (config.target_incorrect or 0)
        if wanted > len(attempts):
            raise ConfigError(
                f"{where}.target_correct + target_incorrect: {wanted} traces are wanted, but the plan has only {len(attempts)} attempts; "
                "raise samples_per_problem or max_attempts, or take more problems"
            )
        prompt_format, shape = load_format(self.experiment.model)
        problems = {attempt.problem.id: attempt.problem for attempt in attempts}
        longest, problem_id = max((len(prompt_format.prompt_ids(problem)), problem.id) for problem in problems.values())
        room = None if shape.max_positions is None else shape.max_positions - longest
        if room is not None and config.import_path is None and config.max_new_tokens > room:
            raise ConfigError(
                f"{where}.max_new_tokens: {config.max_new_tokens} do not fit the model's {shape.max_positions} positions after a prompt "
                f"of {longest} tokens (problem {problem_id}); use at most {room}, or leave that problem out"
            )

    def fingerprint(self) -> Json:
        values = super().fingerprint()
        if self.config.import_path is not None and self.config.import_path.is_file():
            values["imported"] = sha256_file(self.config.import_path)
        return values

    def build(self) -> Work:
        from tribunal.traces.sampling import waves

        attempts = self._attempts()
        selection = self._selection(attempts)

        def enough() -> bool:
            if not selection.targets:
                return False
            self.journal.refresh()  # the prefix runs across all shards
            self._advance(selection)
            return selection.met

        mine = self.shard.mine(waves(attempts, self.config.wave_size))
        before = [attempt.key for wave in mine for attempt in wave if attempt.key in self.journal]
        self.receipt_notes["continued"] = sum(self.journal[key]["trace"]["continued"] for key in before)
        return OverItems(
            mine,
            keys=lambda wave: [attempt.key for attempt in wave],
            process=self._import() if self.config.import_path else self._sample(),
            journal=self.journal,
            unit="trace",
            enough=enough,
        )

    def publish(self, out: Path) -> None:
        from tribunal.traces.sampling import Totals

        self.journal.refresh()
        selection = self._selection(self._attempts())
        self._advance(selection)
        assert selection.met or selection.done == len(selection.attempts), "publish() before all units are there"
        totals = Totals()
        write_jsonl(out / "traces.jsonl", totals.over(Trace.model_validate(self.journal[a.key]["trace"]) for a in selection.kept))
        problems: dict[str, Problem] = {attempt.problem.id: attempt.problem for attempt in selection.kept}
        write_jsonl(out / "problems.jsonl", problems.values())
        warnings = list(selection.warnings())
        for warning in warnings:
            log.warning("generate_traces: %s", warning)
        counts = {"problems": len(problems), **totals.summary(), **selection.summary()}
        write_json(out / "summary.json", {"schema_version": 1, "warnings": warnings, **counts})

    def _attempts(self) -> list[Attempt]:
        """The plan: from the dataset, or the imported file's traces in their order."""
        from tribunal.traces.sampling import Attempt, plan

        problems = self.experiment.dataset.problems()
        if self.config.import_path is None:
            return plan(problems, self.config.samples_per_problem, self.experiment.seed, self.config.max_attempts)
        by_id = {problem.id: problem for problem in problems}
        return [Attempt(by_id[row.problem_id], row.sample) for row in self._imported(problems)][: self.config.max_attempts]

    def _imported(self, problems: Sequence[Problem]) -> Sequence[Any]:
        from tribunal.traces.imports import read_imported

        assert self.config.import_path is not None
        return read_imported(self.config.import_path, problems)

    def _selection(self, attempts: Sequence[Attempt]) -> Selection:
        from tribunal.traces.sampling import Selection

        return Selection(attempts, correct=self.config.target_correct, incorrect=self.config.target_incorrect)

    def _advance(self, selection: Selection) -> None:
        selection.advance(lambda key: self.journal[key]["verdict"] if key in self.journal else None, self.set_aside)

    def _record(self, trace: Trace, problem: Problem) -> Json:
        from tribunal.traces.labels import verdict_of

        return {"trace": trace.model_dump(mode="json"), "verdict": verdict_of(trace, problem)[0]}

    def _sample(self) -> Any:
        """``process`` for waves that are sampled."""
        from tribunal.models.draws import stream
        from tribunal.models.generation import Request, Sampler
        from tribunal.models.loading import load_model
        from tribunal.traces.sampling import make_trace

        config, seed = self.config, self.experiment.seed
        loaded = load_model(self.experiment.model)
        name = f"{loaded.name}@{loaded.revision}"
        sampler = Sampler(
            loaded.model,
            eos_ids=loaded.eos_ids,
            slots=config.slots,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_cache_gb=config.max_cache_gb,
            slots_field="generate_traces.slots",
        )
        state = self.checkpoints(f"wave-{self.shard}")

        def process(wave: Sequence[Attempt], stop: Stop) -> Iterator[Mapping[str, Json]]:
            attempts = {attempt.key: attempt for attempt in wave}
            requests = {
                key: Request(key, loaded.format.prompt_ids(a.problem), config.max_new_tokens, stream(seed, a.problem.id, a.sample))
                for key, a in attempts.items()
            }
            for step in sampler.run(list(requests.values()), stop, state):
                records = {}
                for done in step:
                    self.receipt_notes["continued"] += done.continued and done.key not in self.journal
                    attempt = attempts[done.key]
                    trace = make_trace(attempt, requests[done.key].prompt_ids, done, loaded.format, seed=seed, model=name)
                    records[done.key] = self._record(trace, attempt.problem)
                yield records

        return process

    def _import(self) -> Any:
        """``process`` for waves of traces that exist: each is scored by the model, so that it has log-probabilities."""
        from tribunal.models.loading import load_model
        from tribunal.traces.sampling import import_trace

        loaded = load_model(self.experiment.model)
        rows = {f"{row.problem_id}/{row.sample}": row for row in self._imported(self.experiment.dataset.problems())}

        def process(wave: Sequence[Attempt], stop: Stop) -> Iterator[Mapping[str, Json]]:
            for attempt in wave:
                if attempt.key in self.journal:
                    continue
                if stop.is_set():
                    return
                trace = import_trace(attempt, rows[attempt.key], loaded, seed=self.experiment.seed)
                yield {attempt.key: self._record(trace, attempt.problem)}

        return process


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("generate_traces")
