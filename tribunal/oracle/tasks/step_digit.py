"""Which digit was just written down? Addition traces only; about ten equally frequent answers."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.addition import BOUNDARY, written_steps
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences

CHOICES = [str(digit) for digit in range(10)]


class Task(BaseTask):
    """What was written, a slip included; of the last column's number the last digit.

    The eleven tokens up to the step's boundary tell it; the boundary token alone does not.
    """

    name = "step_digit"
    phrasings = ("Which digit was just written down? Answer with a digit.",)
    code = "d"
    needs = frozenset({"addition"})
    behind = BOUNDARY

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        steps = written_steps(trace, label)
        chosen = [steps[i] for i in self.some(len(steps), rng)]
        return [Draft(self.ask(rng), str(step.step.written % 10), self.window(step.end, rng), CHOICES) for step in chosen]
