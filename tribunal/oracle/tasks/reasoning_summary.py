"""What happened in this reasoning? A sentence made of the trace's own classes and its most important step, so unique to it.

Addition traces hold three of the eight classes; the task is tested on small made traces.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.oracle.tasks.task import BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences

MOST_PHASES = 6
QUOTED_WORDS = 16


class Task(BaseTask):
    """Asked once, at the ends of the most important sentences (as many as ``vectors``), in the order of the trace."""

    name = "reasoning_summary"
    kind = "open"
    phrasings = (
        "Summarise this reasoning: its phases, and the step on which it turns.",
        "What are the phases of this chain of thought, and which step matters most?",
    )
    code = "y"
    needs = frozenset({"classes", "importance"})
    whole_targets = True
    builtin_layers = (2,)

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        labels = sentences.sentences if sentences else []
        ranked = sorted((i for i, found in enumerate(labels) if found.importance is not None), key=lambda i: -(labels[i].importance or 0.0))
        classes = [found.sentence_class for found in labels if found.sentence_class]
        if not ranked or len(classes) < len(labels):
            return []
        phases = [(name.replace("_", " "), len(list(run))) for name, run in groupby(classes)]
        shown = ", then ".join(f"{name} ({count})" if count > 1 else name for name, count in phases[:MOST_PHASES])
        more = f", and {len(phases) - MOST_PHASES} more phases" if len(phases) > MOST_PHASES else ""
        span = label.sentences[ranked[0]]
        text = self.decode(trace.completion_ids[: trace.readable])[span.start_char : span.end_char]
        words = text.split()
        quoted = " ".join(words[:QUOTED_WORDS]) + (" ..." if len(words) > QUOTED_WORDS else "")
        tokens = sorted({label.sentences[i].end_token - 1 for i in ranked[: self.settings.vectors]})
        return [Draft(self.ask(rng), f'{shown}{more}. It turns on "{quoted}".', tokens)]
