"""Is anything carried to the next column? Addition traces only."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.addition import BOUNDARY, written_steps
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences


class Task(BaseTask):
    """The carry that was written, a slip included; the last column carries nothing and is not asked about.

    The eleven tokens up to the step's boundary tell it.
    """

    name = "carry"
    phrasings = ("Which digit is carried to the next column? Answer 0 or 1.",)
    code = "c"
    needs = frozenset({"addition"})
    behind = BOUNDARY

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        steps = [step for step in written_steps(trace, label) if not step.last]
        chosen = [steps[i] for i in self.some(len(steps), rng)]
        return [Draft(self.ask(rng), str(step.step.carry_out), self.window(step.end, rng), ["0", "1"]) for step in chosen]
