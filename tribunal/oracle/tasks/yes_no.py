"""Your own yes/no questions about traces, from a JSONL file.

``examples: {yes_no: questions.jsonl}``, a line for each question: ``{"problem_id": ..., "question": ..., "answer": "yes" | "no",
"sample": 0, "sentence": 3}``. Without ``sample`` all samples of the problem are meant, without ``sentence`` the end of the readable
trace. Texts that are no traces of this model are brought in with ``generate_traces: {import_path: ...}`` first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem, Record, Trace, TraceLabel
from tribunal.core.storage import read_jsonl
from tribunal.oracle.tasks.task import YES_NO, BaseTask, Draft, ExampleSettings, require_traced
from tribunal.traces.sentence_labels import TraceSentences


class Question(Record):
    """One line of the file."""

    problem_id: str
    question: str = Field(min_length=1)
    answer: Literal["yes", "no"]
    sample: int | None = None
    sentence: int | None = Field(None, ge=0, description="number of the sentence at whose end is asked, from 0")


class Task(BaseTask):
    """The questions are the user's own words; nothing is drawn but the number of tokens."""

    name = "yes_no"
    kind = "yes_no"
    phrasings = ("{question}",)
    code = "{question}"
    needs = frozenset({"file"})
    reads_all_labels = True

    def __init__(self, settings: ExampleSettings, decode: Callable[[Sequence[int]], str], *, builtin: bool) -> None:
        super().__init__(settings, decode, builtin=builtin)
        if settings.yes_no is None:
            raise ConfigError("task 'yes_no' needs examples.yes_no: a JSONL file of {problem_id, question, answer, sample?, sentence?}")
        self.path = settings.yes_no
        self._questions: dict[str, list[Question]] = defaultdict(list)
        for question in read_jsonl(self.path, Question):
            self._questions[question.problem_id].append(question)
        if not self._questions:
            raise DataError(f"{self.path}: no questions; give at least one line, or leave the task out")

    def look(self, labels: Iterable[TraceLabel]) -> None:
        names = [[q.problem_id if q.sample is None else f"{q.problem_id}/{q.sample}"] for asked in self._questions.values() for q in asked]
        require_traced(self.path, names, {name for label in labels for name in (label.problem_id, label.key)})

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        drafts = []
        for asked in self._questions.get(trace.problem_id, ()):
            if asked.sample not in (None, trace.sample):
                continue
            start, end = -1, trace.readable
            if asked.sentence is not None:
                if asked.sentence >= len(label.sentences):
                    raise DataError(f"{self.path}: trace {trace.key} has no sentence {asked.sentence}; it has {len(label.sentences)}")
                start, end = label.sentences[asked.sentence].start_token, label.sentences[asked.sentence].end_token
            drafts.append(Draft(self.ask(rng, question=asked.question), asked.answer, self.window(end, rng, start), YES_NO))
        return drafts
