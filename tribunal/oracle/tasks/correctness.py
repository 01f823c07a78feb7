"""Is the answer that this reasoning leads to correct? The tribunal's own label."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import YES_NO, BaseTask, Draft, ExampleSettings
from tribunal.traces.sentence_labels import TraceSentences

MOST_OF_A_VERDICT = 0.75
"""Share of the more frequent verdict among the traces that are asked about: of a model that is nearly always right, most right ones
are passed over, or "yes" would answer everything."""


class Task(BaseTask):
    """Asked at the ends of sentences anywhere in the trace. On the built-in reasoner the signal is planted, in layer 2."""

    name = "correctness"
    kind = "yes_no"
    phrasings = (
        "Does this reasoning end in the correct answer? Answer yes or no.",
        "Is the final answer of this reasoning right? Answer yes or no.",
        "Will this chain of thought reach the correct result? Answer yes or no.",
    )
    code = "v"
    builtin_layers = (2,)
    reads_all_labels = True

    def __init__(self, settings: ExampleSettings, decode: Callable[[Sequence[int]], str], *, builtin: bool) -> None:
        super().__init__(settings, decode, builtin=builtin)
        self._asked: dict[str, float] = {}  # share of the traces, by verdict

    def look(self, labels: Iterable[TraceLabel]) -> None:
        counts: Counter[str] = Counter(label.verdict for label in labels if label.verdict in self.settings.verdicts)
        rarer, more = sorted(("correct", "incorrect"), key=lambda verdict: counts[verdict])
        most = counts[rarer] * MOST_OF_A_VERDICT / (1 - MOST_OF_A_VERDICT)
        self._asked = {more: most / counts[more]} if 0 < most < counts[more] else {}

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        if label.verdict not in ("correct", "incorrect") or _place(trace.key) >= self._asked.get(label.verdict, 1.0):
            return []
        target = "yes" if label.verdict == "correct" else "no"
        spans = [label.sentences[i] for i in self.some(len(label.sentences), rng)]
        return [Draft(self.ask(rng), target, self.window(span.end_token, rng, span.start_token), YES_NO) for span in spans]


def _place(trace_key: str) -> float:
    """Where a trace stands in a fixed order of all, 0 to 1."""
    return int.from_bytes(hashlib.blake2b(json.dumps(["correctness", trace_key]).encode(), digest_size=8).digest(), "big") / 2**64
