"""How near is the model to its own answer here? Thirds of the trace by the logit lens, from label_sentences."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import THIRDS, TraceSentences


class Task(BaseTask):
    """A bucket that can be right, not a probability with two decimals: the sentence's rank among the trace's own."""

    name = "answer_tracking"
    phrasings = (
        f"Compared with the rest of this reasoning, how strongly does the model favour its final answer here: {', '.join(THIRDS)}?",
        f"How far has the final answer taken shape at this point? Answer with one of: {', '.join(THIRDS)}.",
    )
    code = "t"
    needs = frozenset({"answers"})
    synonyms = {"low": ("weak", "weakly"), "middle": ("medium", "moderate", "mid"), "high": ("strong", "strongly")}
    builtin_layers = (2,)

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        labels = sentences.sentences if sentences else []
        known = [(span, found.answer_third) for span, found in zip(label.sentences, labels) if found.answer_third]
        chosen = [known[i] for i in self.some(len(known), rng)]
        return [Draft(self.ask(rng), third, self.window(span.end_token, rng, span.start_token), THIRDS) for span, third in chosen]
