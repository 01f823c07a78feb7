"""The traces that a probe is trained on, as columns: label, problem, stratum, and what the controls read.

Only a trace's small facts and its text are held; token ids are dropped while reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tribunal.core.errors import DataError, LabelError
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.storage import iter_jsonl, read_jsonl


@dataclass(frozen=True)
class Table:
    """One entry per selected trace, in the order of ``traces.jsonl``.

    Attributes:
        keys: (problem_id, sample).
        labels: 1 correct, 0 incorrect.
        n_tokens: readable completion tokens.
        unfinished: cut off by the token limit; unclosed: the thought never ended.
        logprobs: mean and minimum log-probability (nats) of the readable tokens, [n, 2]; None when a trace has none (imported).
        counts: traces by verdict, before the selection.
    """

    keys: list[tuple[str, int]]
    labels: NDArray[np.int64]
    strata: list[str | None]
    texts: list[str]
    questions: list[str]
    n_tokens: NDArray[np.int64]
    unfinished: NDArray[np.bool_]
    unclosed: NDArray[np.bool_]
    logprobs: NDArray[np.float64] | None
    counts: dict[str, int]
    template_sha256: str
    dataset: dict[str, str]

    @property
    def problems(self) -> list[str]:
        return [problem for problem, _ in self.keys]

    def __len__(self) -> int:
        return len(self.keys)


def read_table(
    traces: Path, labels: Path, *, truncated_as_incorrect: bool = False, extracted: Collection[tuple[str, int]] | None = None
) -> Table:
    """Join traces, problems and labels, and keep the traces with a right or a wrong answer.

    Args:
        traces, labels: the result folders of generate_traces and label_traces.
        extracted: (problem_id, sample) of the traces that have activations; others are left out and counted as ``not_extracted``.
        truncated_as_incorrect: count a trace cut off by the token limit as incorrect instead of leaving it out.
    Raises:
        DataError: a trace without label, or a label or trace of an unknown problem.
        LabelError: no trace with a right or a wrong answer.
    """
    verdicts = {label.key: label for label in iter_jsonl(labels / "labels.jsonl", TraceLabel)}
    problems = {problem.id: problem for problem in read_jsonl(traces / "problems.jsonl", Problem)}
    as_label = {"correct": 1, "incorrect": 0, **({"truncated": 0} if truncated_as_incorrect else {})}
    counts: Counter[str] = Counter()
    keys, values, strata, texts, questions = [], [], [], [], []
    numbers: list[tuple[int, bool, bool]] = []
    logprobs: list[tuple[float, float]] | None = []
    templates, datasets = set(), set()
    for trace in iter_jsonl(traces / "traces.jsonl", Trace):
        label, problem = verdicts.get(trace.key), problems.get(trace.problem_id)
        if label is None:
            raise DataError(f"{labels / 'labels.jsonl'}: no label for trace {trace.key}; run label_traces again")
        if problem is None:
            raise DataError(f"{traces / 'problems.jsonl'}: no problem {trace.problem_id}, which trace {trace.key} is of")
        if label.verdict in as_label and extracted is not None and (trace.problem_id, trace.sample) not in extracted:
            counts["not_extracted"] += 1
            continue
        counts[label.verdict] += 1
        if label.verdict not in as_label:
            continue
        keys.append((trace.problem_id, trace.sample))
        values.append(as_label[label.verdict])
        strata.append(label.stratum)
        texts.append(f"{trace.thought}\n{trace.response}" if trace.thought else trace.response)
        questions.append(problem.question)
        unclosed = trace.thought_end is None
        numbers.append((trace.readable, trace.finish_reason == "length", unclosed))
        if len(trace.logprobs) < trace.readable:
            logprobs = None  # imported without log-probabilities: the control is left out
        elif logprobs is not None:
            read = np.array(trace.logprobs[: trace.readable] or [0.0])
            logprobs.append((float(read.mean()), float(read.min())))
        templates.add(trace.template_sha256)
        datasets.add((problem.dataset, problem.revision))
    if not keys:
        found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "no traces"
        raise LabelError(f"{labels / 'labels.jsonl'}: no trace is correct or incorrect ({found}); nothing to train a probe on")
    if len(templates) > 1 or len(datasets) > 1:
        raise DataError(f"{traces / 'traces.jsonl'}: traces of {len(templates)} prompt templates and {len(datasets)} datasets in one file")
    n_tokens, unfinished, unclosed_column = zip(*numbers)
    dataset, revision = datasets.pop()
    return Table(
        keys=keys,
        labels=np.array(values, dtype=np.int64),
        strata=strata,
        texts=texts,
        questions=questions,
        n_tokens=np.array(n_tokens, dtype=np.int64),
        unfinished=np.array(unfinished, dtype=bool),
        unclosed=np.array(unclosed_column, dtype=bool),
        logprobs=np.array(logprobs, dtype=np.float64) if logprobs is not None else None,
        counts=dict(sorted(counts.items())),
        template_sha256=templates.pop(),
        dataset={"name": dataset, "revision": revision},
    )


def require_classes(labels: NDArray[np.int64], problems: list[str], *, min_per_class: int, folds: int, where: str) -> None:
    """Refuse labels that cannot carry the analysis.

    Raises:
        LabelError: a class has fewer than ``min_per_class`` traces, or than ``folds`` problems; names the counts.
    """
    right, wrong = int(labels.sum()), int((1 - labels).sum())
    if min(right, wrong) < min_per_class:
        raise LabelError(
            f"{where}: {right} correct and {wrong} incorrect traces, at least {min_per_class} of each are needed "
            "(train_probes.min_per_class); sample more traces, or problems of another difficulty"
        )
    by_class = [len({problem for problem, label in zip(problems, labels) if label == value}) for value in (0, 1)]
    if min(by_class) < folds:
        raise LabelError(
            f"{where}: correct traces come from {by_class[1]} problems and incorrect ones from {by_class[0]}; "
            f"{folds} folds by problem (train_probes.folds) need {folds} of each"
        )
