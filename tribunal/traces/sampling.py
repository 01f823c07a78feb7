"""Which traces are sampled, in which fixed order, and which of them are kept.

Everything here is a function of the problems, the seed and the verdicts, never of the number of shards, of slots, or of
what finished first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tribunal.core.errors import DataError
from tribunal.core.receipts import read_receipt
from tribunal.core.records import VERDICTS, Problem, Trace, Verdict
from tribunal.models.draws import order_key
from tribunal.traces.imports import ImportedTrace

if TYPE_CHECKING:  # an experiment is checked against its plan without torch
    from tribunal.models.formats import PromptFormat
    from tribunal.models.generation import Finished
    from tribunal.models.loading import LoadedModel

Json = dict[str, Any]


class Attempt(NamedTuple):
    """One trace to be sampled."""

    problem: Problem
    sample: int

    @property
    def key(self) -> str:
        return f"{self.problem.id}/{self.sample}"


def plan(problems: Sequence[Problem], samples: int, seed: int, most: int | None = None) -> list[Attempt]:
    """All attempts in their fixed order: problems shuffled by the seed, the samples of each in sequence, at most ``most``."""
    order = sorted(problems, key=lambda problem: order_key(seed, problem.id))
    return [Attempt(problem, sample) for problem in order for sample in range(samples)][:most]


def sampled_with(folder: Path) -> Json:
    """The settings that a finished generate_traces ran with (temperature, top_p, top_k, max_new_tokens, ...), from its receipt.

    Raises:
        DataError: its receipt names none.
    """
    receipt = read_receipt(folder) or {}
    try:
        return dict(receipt["config"]["generate_traces"])
    except KeyError:
        raise DataError(f"{folder}: its receipt names no generate_traces settings; run generate_traces again") from None


def waves(attempts: Sequence[Attempt], size: int) -> list[Sequence[Attempt]]:
    """The plan cut into the pieces that are sampled together."""
    return [attempts[start : start + size] for start in range(0, len(attempts), size)]


class Selection:
    """Counts verdicts along the fixed order until both targets are met, and says which traces are kept.

    The prefix that counts is the shortest that meets the targets. Inside it the excess of a class that is full is dropped;
    unparsable and truncated traces stay for the record.

    Args:
        attempts: the plan.
        targets: how many correct and incorrect traces are wanted; None for no limit on that class.
    """

    def __init__(self, attempts: Sequence[Attempt], *, correct: int | None, incorrect: int | None) -> None:
        self.attempts = attempts
        self.targets: dict[Verdict, int] = {}
        if correct is not None:
            self.targets["correct"] = correct
        if incorrect is not None:
            self.targets["incorrect"] = incorrect
        self.counts: Counter[str] = Counter()
        self.kept: list[Attempt] = []
        self.done = 0

    @property
    def met(self) -> bool:
        """Whether there are targets and the finished prefix meets them."""
        return bool(self.targets) and all(self.counts[verdict] >= target for verdict, target in self.targets.items())

    def advance(self, verdict_of: Callable[[str], Verdict | None], set_aside: Collection[str] = ()) -> None:
        """Go on along the order as far as traces are finished without a gap.

        Args:
            verdict_of: a finished trace's verdict by key, None while it is not finished.
            set_aside: attempts that are not tried again: passed over.
        """
        while self.done < len(self.attempts) and not self.met:
            attempt = self.attempts[self.done]
            verdict = verdict_of(attempt.key)
            if verdict is None and attempt.key in set_aside:
                self.done += 1
                continue
            if verdict is None:
                return
            self.done += 1
            if self.counts[verdict] < self.targets.get(verdict, math.inf):
                self.kept.append(attempt)
            self.counts[verdict] += 1

    def summary(self) -> Json:
        """Counts over the attempts that counted, before the excess was dropped."""
        return {
            "planned": len(self.attempts),
            "attempted": self.done,
            "dropped": self.done - len(self.kept),
            "verdicts": {verdict: self.counts[verdict] for verdict in VERDICTS},
            "targets": self.targets or None,
        }

    def warnings(self) -> Iterator[str]:
        for verdict, target in self.targets.items():
            if self.counts[verdict] < target:
                yield (
                    f"target_{verdict} not met: {self.counts[verdict]} of {target} {verdict} traces after all {self.done} attempts; "
                    "raise samples_per_problem or max_attempts, take more problems, or lower the target"
                )


def make_trace(attempt: Attempt, prompt_ids: list[int], finished: Finished, prompt_format: PromptFormat, *, seed: int, model: str) -> Trace:
    """The record of a sampled completion; texts are derived from the ids, log-probabilities kept to 6 decimals."""
    reading = prompt_format.read(finished.tokens, prompt_ids)
    return Trace(
        problem_id=attempt.problem.id,
        sample=attempt.sample,
        prompt_ids=prompt_ids,
        completion_ids=finished.tokens,
        logprobs=[round(logprob, 6) for logprob in finished.logprobs],
        finish_reason=cast(Any, finished.finish_reason),
        seed=seed,
        readable=reading.readable,
        thought=reading.thought,
        thought_end=reading.thought_end,
        response=reading.response,
        model=model,
        template_sha256=prompt_format.template_sha256,
        continued=finished.continued,
    )


def import_trace(attempt: Attempt, row: ImportedTrace, loaded: LoadedModel, *, seed: int) -> Trace:
    """The record of a trace that was sampled elsewhere, scored by the model.

    Text is tokenised once, here; a finished one gets the end-of-sequence token that its sampler had dropped.

    Raises:
        DataError: token ids that the model does not have, or too many of them.
    """
    from tribunal.models.generation import Finished, score

    prompt_ids = loaded.format.prompt_ids(attempt.problem)
    if row.completion_ids is not None:
        ids = list(row.completion_ids)
    else:
        ids = list(loaded.tokenizer(row.text or "", add_special_tokens=False)["input_ids"])
        if row.finish_reason == "stop":
            ids += loaded.eos_ids[:1]
    if max(ids) >= loaded.shape.vocab_size:
        raise DataError(f"imported trace {attempt.key}: token id {max(ids)}, but {loaded.name} has ids up to {loaded.shape.vocab_size - 1}")
    if (most := loaded.shape.max_positions) is not None and len(prompt_ids) + len(ids) > most:
        raise DataError(f"imported trace {attempt.key}: {len(prompt_ids)} + {len(ids)} tokens, but {loaded.name} has {most} positions")
    finished = Finished(attempt.key, ids, score(loaded.model, prompt_ids, ids), row.finish_reason, continued=False)
    return make_trace(attempt, prompt_ids, finished, loaded.format, seed=seed, model=f"{loaded.name}@{loaded.revision}")


class Totals:
    """Counts and lengths of published traces, gathered while they are written."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Counter[str] = Counter()
        self.thoughts = 0
        self.continued = 0

    def over(self, traces: Iterable[Trace]) -> Iterator[Mapping[str, Any]]:
        """Pass the traces through as JSON, counting them."""
        for trace in traces:
            self.lengths.append(len(trace.completion_ids))
            self.logprobs.append(mean(trace.logprobs))
            self.finish[trace.finish_reason] += 1
            self.thoughts += trace.thought_end is not None
            self.continued += trace.continued
            yield trace.model_dump(mode="json")

    def summary(self) -> Json:
        return {
            "traces": len(self.lengths),
            "finish": {"stop": self.finish["stop"], "length": self.finish["length"]},
            "closed_thoughts": self.thoughts,
            "continued": self.continued,
            "tokens": sum(self.lengths),
            "tokens_mean": round(mean(self.lengths), 3) if self.lengths else None,
            "tokens_median": median(self.lengths) if self.lengths else None,
            "tokens_max": max(self.lengths, default=None),
            "logprob_mean": round(mean(self.logprobs), 6) if self.logprobs else None,
        }
