"""The examples of an experiment: its traces with their labels, asked every question of the chosen tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tribunal.core.records import Problem, TraceLabel
from tribunal.core.storage import iter_jsonl, read_json, read_jsonl
from tribunal.models.loading import LoadedModel
from tribunal.oracle.examples import Example, build_examples
from tribunal.oracle.prompts import is_builtin
from tribunal.oracle.tasks.task import ExampleSettings, make_tasks
from tribunal.traces.files import TraceFile
from tribunal.traces.sentence_labels import SentenceFile


class Corpus:
    """Everything there is to ask, in a fixed order.

    Args:
        traces, labels: results of generate_traces and label_traces.
        sentence_labels: results of label_sentences, None where no task needs them.

    Attributes:
        warnings: what the audit of label_sentences worries about.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        traces: Path,
        labels: Path,
        sentence_labels: Path | None,
        tasks: Sequence[str],
        settings: ExampleSettings,
        seed: int,
    ) -> None:
        self.traces = TraceFile(traces / "traces.jsonl")
        self.problems: Mapping[str, Problem] = {p.id: p for p in read_jsonl(traces / "problems.jsonl", Problem)}
        self.warnings: list[str] = [] if sentence_labels is None else read_json(sentence_labels / "audit.json")["warnings"]
        self.examples: list[Example] = list(
            build_examples(
                make_tasks(tasks, settings, loaded.format.decode, builtin=is_builtin(loaded)),
                self.traces.read(range(len(self.traces))),
                _Lines(labels / "labels.jsonl"),
                self.problems,
                None if sentence_labels is None else SentenceFile(sentence_labels / "sentences.jsonl"),
                settings,
                seed,
                n_layers=loaded.n_layers,
            )
        )

    def of_split(self, split: str) -> list[Example]:
        return [example for example in self.examples if example.split == split]

    @cached_property
    def digest(self) -> str:
        """Of every example, its question, answer and tokens: another one means other traces, labels or question files."""
        total = hashlib.sha256()
        for example in self.examples:
            total.update(example.model_dump_json().encode())
        return total.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Examples by task and split."""
        found: dict[str, dict[str, int]] = {}
        for example in self.examples:
            row = found.setdefault(example.task, {"train": 0, "validation": 0, "test": 0})
            row[example.split] += 1
        return found


class _Lines(Collection[TraceLabel]):
    """The labels, read from the disk each time they are gone over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[TraceLabel]:
        return iter_jsonl(self.path, TraceLabel)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, label: object) -> bool:
        return any(known == label for known in self)
