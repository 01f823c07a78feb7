"""Examples for the activation oracle: a question about some tokens of a trace, and its right answer.

Examples are streamed trace by trace. Which questions a trace is asked, in which words, about which tokens and layers is a
function of (seed, task, trace) alone, but for tasks that read all labels to decide whether it is asked; the split is a function of the
problem alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from tribunal.core.errors import DataError
from tribunal.core.records import Problem, Record, Trace, TraceLabel
from tribunal.oracle.tasks.pairs import plain_of, read_pairs
from tribunal.oracle.tasks.task import BaseTask, Draft, ExampleSettings
from tribunal.traces.sentence_labels import TraceSentences

Split = Literal["train", "validation", "test"]


class Example(Record):
    """One question to the oracle."""

    key: str = Field(description="<task>/<problem_id>/<sample>/<number>")
    task: str
    problem_id: str
    group: str = Field(description="the problem whose split it shares, and with whose items it is resampled: of a hinted one the plain one")
    sample: int
    question: str
    target: str
    choices: list[str] = Field([], description="every possible answer of a closed task, in a fixed order; empty for an open one")
    tokens: list[int] = Field(
        description="indices into completion_ids whose residual streams are injected, in order; -1 = last prompt token"
    )
    layers: list[int] = Field(description="injected layer by layer: all tokens of layers[0], then of layers[1], ...")
    stratum: str | None
    split: Split

    @property
    def trace_key(self) -> str:
        return f"{self.problem_id}/{self.sample}"

    @property
    def n_vectors(self) -> int:
        return len(self.tokens) * len(self.layers)


def split_of(group: str, *, test_share: float, validation_share: float) -> Split:
    """The split of a problem: by a stable hash of its id, whatever the seed, the tasks and the other problems."""
    place = int.from_bytes(hashlib.blake2b(json.dumps(["split", group]).encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if place < test_share else "validation" if place < test_share + validation_share else "train"


def default_layers(n_layers: int) -> list[int]:
    """A quarter, half and three quarters of the way: 9, 18, 27 of 36 layers, as the released oracles read."""
    return sorted({n_layers * quarter // 4 for quarter in (1, 2, 3)})


def rng_of(seed: int, task: str, trace_key: str) -> np.random.Generator:
    """The draws of one task on one trace."""
    name = hashlib.blake2b(json.dumps([task, trace_key]).encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(name, "little")])


def build_examples(
    tasks: Sequence[BaseTask],
    traces: Iterable[Trace],
    labels: Iterable[TraceLabel],
    problems: Mapping[str, Problem],
    sentence_labels: Mapping[str, TraceSentences] | None,
    settings: ExampleSettings,
    seed: int,
    *,
    n_layers: int | None = None,
) -> Iterator[Example]:
    """Every example of every task, trace by trace and within a trace task by task.

    Args:
        tasks: from ``tribunal.oracle.tasks.task.make_tasks``.
        traces, labels: in the same order, one label for each trace. ``labels`` is read twice where a task
            ``reads_all_labels``, so it must be a collection then and not an iterator.
        problems: by id.
        sentence_labels: by trace key, None where label_sentences has not run.
        n_layers: of the model, for the default layers of a model that is not built in.
    Raises:
        DataError: traces, labels and problems do not belong together, a sentence label belongs to other sentences, or a user's file
            names problems or samples without a trace.
    """
    plain = {pair.problem_id: pair.without for pair in read_pairs(settings.pairs)} if settings.pairs else {}
    for task in tasks:
        if task.reads_all_labels:
            assert iter(labels) is not labels, f"task {task.name} reads all labels first: give a collection, not an iterator"
            task.look(labels)
    for trace, label in zip(traces, labels, strict=True):
        if trace.key != label.key:
            raise DataError(f"labels.jsonl has {label.key} where traces.jsonl has trace {trace.key}; run label_traces again")
        if label.verdict not in settings.verdicts:
            continue
        if trace.problem_id not in problems:
            raise DataError(f"trace {trace.key}: problem '{trace.problem_id}' is not in problems.jsonl; run generate_traces again")
        sentences = (sentence_labels or {}).get(trace.key)
        if sentences is not None and len(sentences.sentences) != len(label.sentences):
            raise DataError(
                f"trace {trace.key}: {len(sentences.sentences)} labelled sentences, but labels.jsonl has {len(label.sentences)}; "
                "run label_sentences again"
            )
        group = plain_of(trace.problem_id, plain, problems)  # a hinted problem goes where the plain one is
        split = split_of(group, test_share=settings.test_share, validation_share=settings.validation_share)
        for task in tasks:
            rng = rng_of(seed, task.name, trace.key)
            for number, draft in enumerate(task.examples(trace, label, problems[trace.problem_id], sentences, rng)):
                yield Example(
                    key=f"{task.name}/{trace.key}/{number}",
                    task=task.name,
                    problem_id=trace.problem_id,
                    group=group,
                    sample=trace.sample,
                    question=draft.question,
                    target=draft.target,
                    choices=list(draft.choices),
                    tokens=_checked(draft, trace, task),
                    layers=_layers(task, settings, n_layers, rng),
                    stratum=draft.stratum if draft.stratum is not None else label.stratum,
                    split=split,
                )


def _layers(task: BaseTask, settings: ExampleSettings, n_layers: int | None, rng: np.random.Generator) -> list[int]:
    if settings.layers is not None:
        known = settings.layers
    elif task.builtin:
        known = list(task.builtin_layers)
    else:
        assert n_layers is not None, "n_layers is needed for the default layers"
        known = default_layers(n_layers)
    return list(known) if settings.layers_per_example == "all" else [known[int(rng.integers(len(known)))]]


def _checked(draft: Draft, trace: Trace, task: BaseTask) -> list[int]:
    assert draft.tokens and all(-1 <= token < trace.readable for token in draft.tokens), (
        f"task {task.name}, trace {trace.key}: tokens {draft.tokens} of {trace.readable} readable ones"
    )
    assert not draft.choices or draft.target in draft.choices, f"task {task.name}: '{draft.target}' is none of {list(draft.choices)}"
    return list(draft.tokens)
