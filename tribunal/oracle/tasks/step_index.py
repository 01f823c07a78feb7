"""Which column is being added? Addition traces only; majority about one third on sums of 2 to 4 digits."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.addition import BOUNDARY, written_steps
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences

CHOICES = [str(column) for column in range(1, 10)]


class Task(BaseTask):
    """The eleven tokens up to the step's boundary tell it."""

    name = "step_index"
    phrasings = ("Which column of the sum was just added, counted from the right? Answer with a number.",)
    code = "i"
    needs = frozenset({"addition"})
    behind = BOUNDARY

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        steps = written_steps(trace, label)
        chosen = [steps[i] for i in self.some(len(steps), rng)]
        return [Draft(self.ask(rng), str(step.column), self.window(step.end, rng), CHOICES) for step in chosen]
