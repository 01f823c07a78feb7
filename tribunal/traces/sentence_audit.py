"""The audit of sentence labels: what was labelled, how it is spread, and what to worry about."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from tribunal.traces.sentence_labels import CLASSES, THIRDS, TIERS, TraceSentences

Json = dict[str, Any]
MOST_OF_A_CLASS = 0.9
LEAST_COVERED = 0.5
MOST_OF_A_TIER = 0.4
MOST_DROWNED = 0.25
"""Share of a trace's sentences, a tier of them, that may matter no more than rounding does."""
POSITION = 0.4
"""Mean rank correlation with the sentence's number from which on position alone tells much of a label."""


class TraceChance(NamedTuple):
    """Of one trace whose rollouts were compared: mean importances, and whether any is beyond chance."""

    importance: float
    by_chance: float
    beyond: bool


class SentenceAudit:
    """Counts traces as they are published."""

    def __init__(self) -> None:
        self.traces = self.sentences = 0
        self.classes: Counter[str | None] = Counter()
        self.tiers: Counter[str | None] = Counter()
        self.thirds: Counter[str | None] = Counter()
        self.measured = self.tracked = 0
        self.suppressed = self.drowned = 0
        self.resampled: list[TraceChance] = []
        self.correlations: defaultdict[str, list[float]] = defaultdict(list)

    def see(self, row: TraceSentences) -> None:
        self.traces += 1
        self.sentences += len(row.sentences)
        self.classes.update(sentence.sentence_class for sentence in row.sentences)
        self.tiers.update(sentence.tier for sentence in row.sentences)
        self.thirds.update(sentence.answer_third for sentence in row.sentences)
        self.tracked += any(sentence.answer_logprob is not None for sentence in row.sentences)
        values = [sentence.importance for sentence in row.sentences if sentence.importance is not None]
        by_chance = [sentence.importance_by_chance for sentence in row.sentences if sentence.importance_by_chance is not None]
        self.measured += len(values)
        if by_chance and all(sentence.importance_p is None for sentence in row.sentences):
            self.drowned += sum(value <= chance for value, chance in zip(values, by_chance)) > MOST_DROWNED * len(values)
            self.suppressed += 1
        elif by_chance:
            self.resampled.append(TraceChance(mean(values), mean(by_chance), row.beyond_chance))
        self._correlate("importance", values, len(TIERS))
        self._correlate("answers", [s.answer_logprob for s in row.sentences if s.answer_logprob is not None], len(THIRDS))

    def _correlate(self, what: str, values: Sequence[float], least: int) -> None:
        if len(values) >= least and len(set(values)) > 1:
            self.correlations[what].append(float(spearmanr(range(len(values)), values).statistic))

    def as_json(self, *, classes: str, importance: str, track_answers: bool, set_aside: Sequence[str] = ()) -> Json:
        """The content of ``audit.json``; the arguments say how labels were made."""
        position = {what: round(mean(found), 6) for what, found in self.correlations.items()}
        measured = {"by": importance, "measured": self.measured, "by_chance": self._by_chance()}
        return {
            "warnings": self._warnings(classes, importance, track_answers, position),
            "traces": self.traces,
            "sentences": self.sentences,
            "set_aside": sorted(set_aside),
            "classes": {"by": classes, **_counts(self.classes, CLASSES)},
            "importance": {**measured, "position_correlation": position.get("importance"), **_counts(self.tiers, TIERS)},
            "answers": {
                "tracked_traces": self.tracked if track_answers else None,
                "position_correlation": position.get("answers"),
                **_counts(self.thirds, THIRDS),
            },
        }

    def _by_chance(self) -> Json | None:
        """Rollouts: importance beside what shuffled rollouts give, means over traces."""
        if not self.resampled:
            return None
        return {
            "traces": len(self.resampled),
            "traces_within_chance": sum(not trace.beyond for trace in self.resampled),
            "mean_importance": round(mean(trace.importance for trace in self.resampled), 6),
            "mean_by_chance": round(mean(trace.by_chance for trace in self.resampled), 6),
        }

    def _warnings(self, classes: str, importance: str, track_answers: bool, position: Mapping[str, float]) -> list[str]:
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
        if (chance := self._by_chance()) and chance["traces_within_chance"]:
            found.append(
                f"in {chance['traces_within_chance']} of {chance['traces']} traces no sentence moves the answers more than chance does "
                f"(mean importance {chance['mean_importance']:.2f}, of shuffled rollouts {chance['mean_by_chance']:.2f}, over all traces): "
                "they get no tier; take more rollouts (label_sentences.rollouts.samples), or suppression"
            )
        if self.drowned:
            found.append(
                f"in {self.drowned} of {self.suppressed} traces more than {MOST_DROWNED:.0%} of the sentences matter no more than rounding "
                "does: their lower tiers are noise; load the model with model.dtype=float32 for label_sentences, or take rollouts"
            )
        for what, (label, name) in {"importance": ("importance", "tier"), "answers": ("answer_logprob", "third")}.items():
            if abs(position.get(what, 0.0)) > POSITION:
                found.append(
                    f"{label} goes with the sentence's position (mean rank correlation {position[what]:+.2f} within traces): "
                    f"whoever knows how far the trace is knows much of the {name}"
                )
        if track_answers and self.tracked < LEAST_COVERED * self.traces:
            found.append(f"only {self.tracked} of {self.traces} traces state their answer word for word before which it can be tracked")
        return found


def _counts(counter: Counter[str | None], names: Sequence[str]) -> Json:
    return {"counts": {name: counter[name] for name in names}, "none": counter[None]}
