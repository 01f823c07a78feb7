"""What a task is: which questions it asks about a trace's activations, and where their right answers come from.

Adding a task is one file in this folder with a class ``Task(BaseTask)``; the module's name is the task's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from tribunal.core import registry
from tribunal.core.config import Section
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem, Trace, TraceLabel, Verdict
from tribunal.traces.sentence_labels import TraceSentences

PACKAGE = "tribunal.oracle.tasks"
Kind = Literal["closed", "open", "yes_no"]
Need = Literal["addition", "classes", "importance", "answers", "pairs", "file"]
NEEDED_FROM: dict[Need, str] = {
    "classes": "label_sentences with classes: rules or judge",
    "importance": "label_sentences with importance: suppression or rollouts",
    "answers": "label_sentences with track_answers: true",
    "pairs": "examples.pairs: a JSONL file of hinted problems",
    "file": "examples.yes_no: a JSONL file of your questions",
    "addition": "traces of the built-in reasoner",
}
YES_NO = ["yes", "no"]
SENTENCE_ENDS = ".!?\"')"
"""Last characters of a whole sentence."""
BUILTIN_VECTORS = 11
"""Tokens of a written sum that are injected by default: a first step and its boundary are eleven."""


class ExampleSettings(Section):
    """How examples are made of traces; the same for training and evaluation."""

    layers: list[int] | None = Field(
        None, min_length=1, description="0-based layers to read; default: a quarter, half and three quarters of the model (each task's own "
        "on the built-in reasoner)"
    )  # fmt: skip
    layers_per_example: Literal["one", "all"] = Field(
        "one", description="one: each example draws one of the layers; all: a block per layer"
    )
    vectors: int = Field(16, ge=1, description="most tokens injected in an example: half the examples take 1, the others 2 to this many")
    per_trace: int = Field(4, ge=1, description="most examples of one task from one trace")
    verdicts: list[Verdict] = Field(["correct", "incorrect"], min_length=1, description="traces with one of these are asked about")
    test_share: float = Field(0.2, gt=0, lt=1, description="share of the problems held out for testing")
    validation_share: float = Field(0.1, gt=0, lt=1, description="share of the problems that choose the checkpoint")
    longest_context: int = Field(16, ge=1, description="context_prediction: most tokens to predict")
    pairs: Path | None = Field(None, description="hint_use: JSONL of {problem_id, without, hint, kind}; see tribunal.oracle.tasks.hint_use")
    yes_no: Path | None = Field(None, description="yes_no: JSONL of {problem_id, question, answer, sample?, sentence?}")

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[int] | None) -> list[int] | None:
        if twice := sorted({layer for layer in layers or () if layers and layers.count(layer) > 1}):
            raise ValueError(f"layer {twice[0]} is given twice; give each layer once")
        return layers

    @model_validator(mode="after")
    def _something_is_left(self) -> ExampleSettings:
        if self.test_share + self.validation_share > 0.9:
            raise ValueError(f"test_share {self.test_share} + validation_share {self.validation_share} leave too little to train on")
        return self

    @property
    def files(self) -> dict[str, Path]:
        """What examples are made of besides traces and labels, by field."""
        given = {"pairs": self.pairs, "yes_no": self.yes_no}
        return {field: path for field, path in given.items() if path is not None}

    def require_files(self, where: str) -> None:
        """Refuse a file that is not there, before anything is loaded.

        Raises:
            ConfigError: names the field and the file.
        """
        for field, path in self.files.items():
            if not path.is_file():
                raise ConfigError(f"{where}.examples.{field}: no such file: {path}; give a JSONL file, or leave it out")


class Draft(NamedTuple):
    """An example before it has its key, split and layers.

    ``tokens`` are indices into ``completion_ids``; -1 is the last token of the prompt.
    """

    question: str
    target: str
    tokens: list[int]
    choices: Sequence[str] = ()
    stratum: str | None = None


class BaseTask:
    """Base class of the tasks; one object serves all traces of a run.

    Class attributes:
        kind: ``closed`` (the target is one of ``choices``), ``yes_no``, or ``open`` (free text).
        phrasings: the question in words; one is drawn for each example.
        code: the question for the built-in reasoner, whose vocabulary is characters: short, and unlike any other task's.
        needs: what a trace must bring besides its label.
        synonyms: for each choice, other names that count as it in fuzzy scoring.
        whole_targets: whether a target is a sentence, so that one without an end was cut off.
        asks_where: in words, which of the traces that bring what it ``needs`` are asked about; empty: all of them.
        builtin_layers: layers read by default on the built-in reasoner.
        behind: tokens behind a sentence's end that are injected too: 1 takes in the boundary.
        unreadable: nothing holds the target (a negative control), so that an oracle which reads it shows a leak.

    Args:
        settings: of all tasks.
        decode: token ids to text, as the traces' prompt format does it.
        builtin: whether the model is the built-in reasoner: questions are codes, windows have a fixed width.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "closed"
    phrasings: ClassVar[tuple[str, ...]]
    code: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    synonyms: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    whole_targets: ClassVar[bool] = False
    asks_where: ClassVar[str] = ""
    builtin_layers: ClassVar[tuple[int, ...]] = (1,)
    behind: ClassVar[int] = 0
    unreadable: ClassVar[bool] = False
    reads_all_labels: ClassVar[bool] = False
    """True: ``look`` is called with the labels of all traces before the first example is asked for."""

    def __init__(self, settings: ExampleSettings, decode: Callable[[Sequence[int]], str], *, builtin: bool) -> None:
        self.settings = settings
        self.decode = decode
        self.builtin = builtin

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        """What is asked of one trace: a pure function of the arguments, in a fixed order; empty where it has nothing to ask.

        Args:
            sentences: what label_sentences says of the trace, None where it says nothing.
            rng: of this task and trace alone.
        """
        raise NotImplementedError

    def look(self, labels: Iterable[TraceLabel]) -> None:
        """Take in all labels, of every verdict, for a task that sets ``reads_all_labels``."""

    @classmethod
    def asks(cls, question: str, *, builtin: bool) -> bool:
        """Whether a question is this task's, in its words or by its code."""
        known = (cls.code,) if builtin else cls.phrasings
        return any(re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(text)), question) for text in known)

    # What tasks share -------------------------------------------------------------------------------------------------

    def ask(self, rng: np.random.Generator, **values: object) -> str:
        """The code, or one of the phrasings, with its values filled in."""
        return (self.code if self.builtin else self.phrasings[rng.integers(len(self.phrasings))]).format(**values)

    def window(self, end: int, rng: np.random.Generator, start: int = -1) -> list[int]:
        """Consecutive tokens that end before ``end``: as many as drawn, none before ``start`` (by default the last prompt token).

        On the built-in reasoner always as many, whatever ``start``, so that their number gives nothing away.
        """
        if self.builtin:
            return list(range(max(-1, end - BUILTIN_VECTORS), end))
        count = 1 if self.settings.vectors == 1 or rng.random() < 0.5 else int(rng.integers(2, self.settings.vectors + 1))
        return list(range(max(start, end - count), end))

    def some(self, count: int, rng: np.random.Generator) -> list[int]:
        """At most ``per_trace`` of ``count`` numbers, in order."""
        if count <= self.settings.per_trace:
            return list(range(count))
        return sorted(int(i) for i in rng.choice(count, self.settings.per_trace, replace=False))


def task_class(name: str) -> type[BaseTask]:
    """The task of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    kind: type[BaseTask] = registry.load(PACKAGE, name, "oracle task").Task
    assert kind.name == name, f"{kind.__module__}: its task is called {kind.name}"
    return kind


def known_tasks() -> list[str]:
    return registry.names(PACKAGE)


def require(names: Collection[str], available: Collection[Need], where: str) -> None:
    """Refuse tasks that lack what they need.

    Raises:
        ConfigError: names the task, what it lacks and where that comes from.
    """
    for name in names:
        for need in sorted(task_class(name).needs):
            if need not in available:
                raise ConfigError(f"{where}: task '{name}' needs {NEEDED_FROM[need]}; add that, or leave the task out")


def require_traced(path: Path, lines: Sequence[Sequence[str]], traced: Collection[str]) -> None:
    """Refuse a user's file with lines that would be passed over, since there is no trace of what they name.

    Args:
        lines: what each line names: problems, or traces by key.
        traced: what there is.
    Raises:
        DataError: names the file, how many lines, and the first name.
    """
    if lost := [name for names in lines for name in [n for n in names if n not in traced][:1]]:
        raise DataError(
            f"{path}: {len(lost)} of {len(lines)} lines are about problems or samples without a trace, first '{lost[0]}'; take them out, "
            "or sample those problems (generate_traces)"
        )


def make_tasks(names: Sequence[str], settings: ExampleSettings, decode: Callable[[Sequence[int]], str], *, builtin: bool) -> list[BaseTask]:
    """The tasks of a run, each ready to be asked for examples.

    Raises:
        ConfigError: there is no such task.
        DataError: a file that a task reads (pairs, own questions) cannot be used.
    """
    return [task_class(name)(settings, decode, builtin=builtin) for name in dict.fromkeys(names)]
