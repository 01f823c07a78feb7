"""What does this sentence do in the reasoning? One of eight classes, from label_sentences.

Addition traces hold three of the eight (computation, `wait`, the answer); the task is tested on small made traces.
"""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import CLASSES, TraceSentences

LISTED = ", ".join(name.replace("_", " ") for name in CLASSES)
WORDS = [name.replace("_", " ") for name in CLASSES]


class Task(BaseTask):
    """Source of the classes: Bogdan et al. (2025), "Thought Anchors"."""

    name = "sentence_class"
    phrasings = (
        f"What does this sentence do in the reasoning? Answer with one of: {LISTED}.",
        f"Name the function of the sentence that ends here: {LISTED}.",
    )
    code = "s"
    needs = frozenset({"classes"})
    synonyms = {
        "problem setup": ("setup", "problem restatement", "restating the problem", "problem statement"),
        "plan generation": ("planning", "plan", "making plan", "strategy"),
        "fact retrieval": ("recall", "fact recall", "recalling fact", "knowledge retrieval"),
        "active computation": ("computation", "calculation", "computing", "calculating", "arithmetic", "active calculation"),
        "result consolidation": ("consolidation", "summary", "summarising", "summarizing", "consolidating results"),
        "uncertainty management": ("uncertainty", "backtracking", "doubt", "re-evaluation", "reevaluation", "hesitation"),
        "self checking": ("self-checking", "checking", "verification", "verifying", "self check", "self verification"),
        "final answer emission": ("final answer", "answer emission", "answer", "giving final answer", "stating answer"),
    }

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        labels = sentences.sentences if sentences else []
        known = [(span, found.sentence_class) for span, found in zip(label.sentences, labels) if found.sentence_class]
        chosen = [known[i] for i in self.some(len(known), rng)]
        return [
            Draft(self.ask(rng), name.replace("_", " "), self.window(span.end_token, rng, span.start_token), WORDS) for span, name in chosen
        ]
