"""A coin thrown for each trace: the negative control, a target that nothing can read."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences


def bit_of(trace_key: str) -> str:
    """0 or 1, by a hash of the trace's key: in no token, no activation and no question."""
    return str(hashlib.blake2b(json.dumps(["random_bit", trace_key]).encode(), digest_size=1).digest()[0] & 1)


class Task(BaseTask):
    """An oracle that beats the majority here on held-out problems has seen them: look for a leak."""

    name = "random_bit"
    phrasings = ("A coin was thrown for this text. What did it show? Answer 0 or 1.",)
    code = "r"
    behind = 1
    unreadable = True

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        ends = [min(span.end_token + self.behind, trace.readable) for span in label.sentences]
        chosen = [ends[i] for i in self.some(len(ends), rng)]
        return [Draft(self.ask(rng), bit_of(trace.key), self.window(end, rng), ["0", "1"]) for end in chosen]
