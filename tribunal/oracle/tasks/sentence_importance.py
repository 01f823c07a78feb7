"""How much does what follows hang on this sentence? Four tiers, ranked within the problem, from label_sentences."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TIERS, TraceSentences


class Task(BaseTask):
    """A quarter of a problem's sentences is in each tier, so no constant answer is right more often than that."""

    name = "sentence_importance"
    phrasings = (
        f"How important is this sentence for what follows? Answer with one of: {', '.join(TIERS)}.",
        f"How strongly does the rest of the reasoning depend on the sentence that ends here: {', '.join(TIERS)}?",
    )
    code = "m"
    needs = frozenset({"importance"})
    synonyms = {
        "low": (
            "unimportant", "minor", "negligible", "not important", "little", "less important", "least important", "hardly important",
            "barely important",
        ),
        "medium": ("moderate", "middling", "somewhat important", "moderately important", "fairly important"),
        "high": ("important", "major", "very important"),
        "critical": ("crucial", "essential", "pivotal", "decisive"),
    }  # fmt: skip
    builtin_layers = (2,)

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        labels = sentences.sentences if sentences else []
        known = [(span, found.tier) for span, found in zip(label.sentences, labels) if found.tier]
        chosen = [known[i] for i in self.some(len(known), rng)]
        return [Draft(self.ask(rng), tier, self.window(span.end_token, rng, span.start_token), TIERS) for span, tier in chosen]
