"""The audit of sentence labels: what was labelled, how it is spread, and what to worry about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from tribunal.traces.sentence_labels import CLASSES, THIRDS, TIERS, TraceSentences

Json = dict[str, Any]
MOST_OF_A_CLASS = 0.9
LEAST_COVERED = 0.5
MOST_OF_A_TIER = 0.4
POSITION = 0.6


class SentenceAudit:
    """Counts traces as they are published."""

    def __init__(self) -> None:
        self.traces = self.sentences = 0
        self.classes: Counter[str | None] = Counter()
        self.tiers: Counter[str | None] = Counter()
        self.thirds: Counter[str | None] = Counter()
        self.measured = self.tracked = 0
        self.correlations: list[float] = []

    def see(self, row: TraceSentences) -> None:
        self.traces += 1
        self.sentences += len(row.sentences)
        self.classes.update(sentence.sentence_class for sentence in row.sentences)
        self.tiers.update(sentence.tier for sentence in row.sentences)
        self.thirds.update(sentence.answer_third for sentence in row.sentences)
        self.tracked += any(sentence.answer_logprob is not None for sentence in row.sentences)
        values = [sentence.importance for sentence in row.sentences if sentence.importance is not None]
        self.measured += len(values)
        if len(values) >= len(TIERS) and len(set(values)) > 1:
            self.correlations.append(float(spearmanr(range(len(values)), values).statistic))

    def as_json(self, *, classes: str, importance: str, track_answers: bool, set_aside: Sequence[str] = ()) -> Json:
        """The content of ``audit.json``; the arguments say how labels were made."""
        position = round(mean(self.correlations), 6) if self.correlations else None
        return {
            "warnings": self._warnings(classes, importance, track_answers, position),
            "traces": self.traces,
            "sentences": self.sentences,
            "set_aside": sorted(set_aside),
            "classes": {"by": classes, **_counts(self.classes, CLASSES)},
            "importance": {"by": importance, "measured": self.measured, "position_correlation": position, **_counts(self.tiers, TIERS)},
            "answers": {"tracked_traces": self.tracked if track_answers else None, **_counts(self.thirds, THIRDS)},
        }

    def _warnings(self, classes: str, importance: str, track_answers: bool, position: float | None) -> list[str]:
        found = []
        if set(self.classes) - {None}:
            labelled = self.sentences - self.classes[None]
            name, count = max(((n, c) for n, c in self.classes.items() if n is not None), key=lambda item: item[1])
            if count > MOST_OF_A_CLASS * labelled:
                found.append(f"{count} of {labelled} labelled sentences are '{name}': a task on them measures little else")
            if classes == "rules" and labelled < LEAST_COVERED * self.sentences:
                found.append(f"no rule applies to {self.sentences - labelled} of {self.sentences} sentences; take classes: judge")
        if importance != "none":
            ranked = self.measured and sum(self.tiers[tier] for tier in TIERS)
            if not ranked:
                found.append("no sentence could be ranked: all of a problem's are equally important, or there are fewer than four")
            elif (tier := max(TIERS, key=lambda tier: self.tiers[tier])) and self.tiers[tier] > MOST_OF_A_TIER * ranked:
                found.append(
                    f"ties leave {self.tiers[tier]} of {ranked} ranked sentences in tier '{tier}'; take more rollouts, or suppression"
                )
        if position is not None and abs(position) > POSITION:
            found.append(
                f"importance goes with the sentence's position (mean rank correlation {position:+.2f} within traces): "
                "whoever knows how far the trace is knows much of the tier"
            )
        if track_answers and self.tracked < LEAST_COVERED * self.traces:
            found.append(f"only {self.tracked} of {self.traces} traces state their answer word for word before which it can be tracked")
        return found


def _counts(counter: Counter[str | None], names: Sequence[str]) -> Json:
    return {"counts": {name: counter[name] for name in names}, "none": counter[None]}
