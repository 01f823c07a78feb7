"""What happened in this reasoning? A sentence made of the trace's own classes and its most important step, so unique to it.

Addition traces hold three of the eight classes; the task is tested on small made traces.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from tribunal.core.records import Problem, Span, Trace, TraceLabel
from tribunal.oracle.tasks.task import SENTENCE_ENDS, BaseTask, Draft
from tribunal.traces.sentence_labels import TraceSentences
from tribunal.traces.sentences import PARTIAL

LEAST_CLASSED = 0.5
"""Share of a trace's sentences that must have a class: what is left out of a summary is less than what is in it."""
MOST_PHASES = 4
QUOTED_TOKENS = 20
"""With so many, a summary takes about 60 tokens of a large vocabulary: fewer than ``train_oracle.max_new_tokens``."""


class Task(BaseTask):
    """Asked once, at the ends of the most important sentences (as many as ``vectors``), in the order of the trace.

    A phase is a run of sentences of one class. Sentences without a class end a phase and are left out.
    """

    name = "reasoning_summary"
    kind = "open"
    phrasings = (
        "Summarise this reasoning: its phases, and the step on which it turns.",
        "What are the phases of this chain of thought, and which step matters most?",
    )
    code = "y"
    needs = frozenset({"classes", "importance"})
    whole_targets = True
    asks_where = f"a class for at least {LEAST_CLASSED:.0%} of a trace's sentences"
    builtin_layers = (2,)

    def examples(
        self, trace: Trace, label: TraceLabel, problem: Problem, sentences: TraceSentences | None, rng: np.random.Generator
    ) -> list[Draft]:
        if sentences is None or not sentences.beyond_chance:
            return []
        labels = sentences.sentences
        ranked = sorted((i for i, found in enumerate(labels) if found.importance is not None), key=lambda i: -(labels[i].importance or 0.0))
        classes = [found.sentence_class for found in labels]
        if not ranked or len(classes) - classes.count(None) < LEAST_CLASSED * len(classes):
            return []
        phases = [(name.replace("_", " "), len(list(run))) for name, run in groupby(classes) if name]
        shown = ", then ".join(f"{name} ({count})" if count > 1 else name for name, count in phases[:MOST_PHASES])
        rest = len(phases) - MOST_PHASES
        more = f", and {rest} more phase{'s' * (rest > 1)}" if rest > 0 else ""
        tokens = sorted({label.sentences[i].end_token - 1 for i in ranked[: self.settings.vectors]})
        return [Draft(self.ask(rng), f"{shown}{more}. It turns on: {self._quoted(trace, label.sentences[ranked[0]])}", tokens)]

    def _quoted(self, trace: Trace, span: Span) -> str:
        """The sentence, its first tokens where it is long; without an end only where the trace was cut off in it."""
        if span.end_token - span.start_token > QUOTED_TOKENS:
            ids = trace.completion_ids[span.start_token : span.start_token + QUOTED_TOKENS]
            return " ".join(self.decode(ids).rstrip(PARTIAL).split()) + " ..."
        text = " ".join(self.decode(trace.completion_ids[: trace.readable])[span.start_char : span.end_char].split())
        cut_off = trace.finish_reason == "length" and span.end_token >= trace.readable
        return text if cut_off or text[-1] in SENTENCE_ENDS else text.rstrip(" :;,") + "."
