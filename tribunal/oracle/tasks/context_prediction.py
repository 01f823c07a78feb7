"""Which tokens come next, or came before? Needs no labels: it teaches the oracle to read activations at all."""

from __future__ import annotations

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences
from tribunal.traces.sentences import PARTIAL


class Task(BaseTask):
    """The tokens asked for are never among those injected. Source: Karvonen et al. (2025), "past lens" and "future lens"."""

    name = "context_prediction"
    kind = "open"
    phrasings = (
        "Can you predict the {direction} {count} tokens?",
        "Which {count} tokens come {place} these? Write them out.",
    )
    code = "{letter}{count}"

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        drafts = []
        for _ in range(self.settings.per_trace):
            after = bool(rng.random() < 0.5)
            if trace.readable < 2:
                break
            end = int(rng.integers(1, trace.readable))  # at least a token on each side
            window = self.window(end, rng)
            room = trace.readable - end if after else window[0]
            if room < 1:
                continue
            count = int(rng.integers(1, min(room, self.settings.longest_context) + 1))
            start = end if after else window[0] - count
            text = self.decode(trace.completion_ids[start : start + count])
            if not text.strip() or PARTIAL in text:  # blanks, or half a character
                continue
            values = {
                "direction": "next" if after else "previous",
                "place": "after" if after else "before",
                "letter": "n" if after else "p",
            }
            drafts.append(Draft(self.ask(rng, count=count, **values), text, window))
        return drafts
