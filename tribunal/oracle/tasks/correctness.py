"""Is the answer that this reasoning leads to correct? The tribunal's own label."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import YES_NO, BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences


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

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        if label.verdict not in ("correct", "incorrect"):
            return []
        target = "yes" if label.verdict == "correct" else "no"
        spans = [label.sentences[i] for i in self.some(len(label.sentences), rng)]
        return [Draft(self.ask(rng), target, self.window(span.end_token, rng, span.start_token), YES_NO) for span in spans]
