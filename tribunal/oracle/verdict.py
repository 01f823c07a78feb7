"""From answers to rows: scores with 95 % intervals by problem beside their controls, and what they do and do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tribunal.core import stats
from tribunal.core.records import Report, ReportRow
from tribunal.core.reports import row as report_row
from tribunal.core.stats import Estimate, Floats, Resamples
from tribunal.core.work import Json
from tribunal.oracle.examples import Example
from tribunal.oracle.probe import ProbeAnswer
from tribunal.oracle.scoring import constancy, exact, fuzzy, said_choice

RIVALS = ("majority", "text_only", "shuffled", "zeroed")
"""What can be said without reading the activations. The linear probe reads them too: it stands beside, and is no rival."""
PROMPT_ONLY = "reads the prompt, not the activations"
SHORT = "exact_match"


def mean(scores_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Weighted mean of the scores, [R]; a metric for ``Resamples.estimate``."""
    total = weights_RN.sum(1)
    return np.divide(weights_RN @ scores_N, total, out=np.full(len(weights_RN), np.nan), where=total > 0)


def macro_f1(said_N: Floats, labels_N: NDArray[np.int64], weights_RN: Floats) -> Floats:
    """Mean over the classes among the labels of F1, [R]; ``said_N`` are class numbers, -1 for an answer that names none."""
    scores = []
    for number in range(int(labels_N.max()) + 1):
        is_label, is_said = (labels_N == number).astype(float), (said_N == number).astype(float)
        hits, total = weights_RN @ (is_label * is_said), weights_RN @ is_label + weights_RN @ is_said
        f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
        scores.append(np.where(weights_RN @ is_label > 0, f1, np.nan))
    table = np.array(scores)
    known = np.isfinite(table).sum(0)
    return np.divide(np.nansum(table, 0), known, out=np.full(len(weights_RN), np.nan), where=known > 0)


@dataclass(frozen=True)
class TaskAnswers:
    """One task's items and what was said to each.

    Attributes:
        said: answers by condition or control; ``oracle`` is the best checkpoint's.
        by_step: answers of other kept checkpoints.
        published: answers of adapters that others made, by folder or hub name.
        pair: the two answers of a task that has two, the positive one last.
    """

    task: str
    items: Sequence[Example]
    said: Mapping[str, Sequence[ProbeAnswer]]
    by_step: Mapping[int, Sequence[ProbeAnswer]]
    published: Mapping[str, Sequence[ProbeAnswer]]
    pair: tuple[str, str] | None


class TaskScores:
    """The numbers of one task."""

    def __init__(self, answers: TaskAnswers, resamples: Resamples) -> None:
        self.answers, self.resamples = answers, resamples
        self.task, self.items = answers.task, answers.items
        self.clusters = resamples.index([item.group for item in self.items])
        self.classes = sorted({item.target for item in self.items})
        self.labels = np.array([self.classes.index(item.target) for item in self.items], dtype=np.int64)

    @property
    def metrics(self) -> list[str]:
        closed = ["macro_f1"] if self.items[0].choices else []
        return [SHORT, "fuzzy_match", *closed, *(["auroc", "ece"] if self.answers.pair and len(self.classes) == 2 else [])]

    def estimate(self, metric: str, answers: Sequence[ProbeAnswer]) -> Estimate:
        """A metric of some answers to the items; NaN where they cannot have it."""
        unknown = Estimate(float("nan"), np.full(len(self.resamples.counts_RG), np.nan))
        if metric in ("auroc", "ece"):
            assert self.answers.pair is not None
            odds = [answer.odds for answer in answers]
            if any(value is None for value in odds):
                return unknown
            positive = np.array([item.target == self.answers.pair[1] for item in self.items], dtype=np.int64)
            return self.resamples.estimate(stats.METRICS[metric], np.array(odds, dtype=float), positive, self.clusters)
        if metric == "macro_f1":
            said = np.array([self._class(answer.text) for answer in answers], dtype=float)
            return self.resamples.estimate(macro_f1, said, self.labels, self.clusters)
        pairs = zip(answers, self.items)
        if metric == SHORT:
            scores = [float(exact(answer.text, item.target)) for answer, item in pairs]
        else:
            scores = [fuzzy(self.task, answer.text, item.target, item.choices) for answer, item in pairs]
        return self.resamples.estimate(mean, np.array(scores), self.labels, self.clusters)

    def _class(self, text: str) -> int:
        named = said_choice(self.task, text, self.items[0].choices)
        return self.classes.index(named) if named in self.classes else -1

    def controls(self, metric: str) -> dict[str, Estimate]:
        names = [name for name in (*RIVALS, "linear_probe") if name in self.answers.said]
        return {name: self.estimate(metric, self.answers.said[name]) for name in names}

    def rows(self) -> list[ReportRow]:
        """The best checkpoint's metrics, then the exact and fuzzy matches of the others and of published adapters."""
        found = []
        for metric in self.metrics:
            found.append(self._row(f"{self.task}, {_word(metric)}", metric, self.answers.said["oracle"], self.controls(metric)))
        still = ("majority", "text_only", "linear_probe")  # those that do not depend on the checkpoint
        others = {f"step {step}": answers for step, answers in self.answers.by_step.items()}
        others |= {f"adapter {adapter}": answers for adapter, answers in self.answers.published.items()}
        for name, answers in others.items():
            for metric in (SHORT, "fuzzy_match"):
                controls = {name: value for name, value in self.controls(metric).items() if name in still}
                found.append(self._row(f"{self.task}, {_word(metric)}, {name}", metric, answers, controls))
        return [row for row in found if row is not None]

    def _row(self, name: str, metric: str, answers: Sequence[ProbeAnswer], controls: Mapping[str, Estimate]) -> ReportRow | None:
        estimate = self.estimate(metric, answers)
        if not estimate.known or not any(control.known for control in controls.values()):
            return None
        return report_row(name, metric, estimate, len(self.items), controls=controls, rivals=RIVALS)

    # In words -----------------------------------------------------------------------------------------------------------

    @cached_property
    def headline(self) -> ReportRow:
        """Of the match that the task is judged by: exact for one with choices, fuzzy for free text."""
        metric = SHORT if self.items[0].choices else "fuzzy_match"
        found = self._row(f"{self.task}, {_word(metric)}", metric, self.answers.said["oracle"], self.controls(metric))
        assert found is not None
        return found

    @cached_property
    def unbeaten(self) -> list[str]:
        """The rivals that the oracle does not beat (95 %, paired)."""
        metric = self.headline.metric
        ours, controls = self.estimate(metric, self.answers.said["oracle"]), self.controls(metric)
        return [name for name in RIVALS if name in controls and not ours.minus(controls[name]).interval[0] > 0]

    @property
    def apart(self) -> bool:
        """Whether the oracle's interval lies above that of every rival."""
        return all(self.headline.low > control.high for control in self.headline.controls if control.name in RIVALS)

    @cached_property
    def constant(self) -> str | None:
        """The answer that the oracle gives to nearly everything, None where it does not."""
        judged = constancy([answer.text for answer in self.answers.said["oracle"]], [item.target for item in self.items])
        return judged.answer if judged.constant else None

    @cached_property
    def over_linear_probe(self) -> Estimate | None:
        """The oracle's lead over the probe; None for free answers, which no probe gives."""
        if "linear_probe" not in self.answers.said:
            return None
        metric = self.headline.metric
        return self.estimate(metric, self.answers.said["oracle"]).minus(self.estimate(metric, self.answers.said["linear_probe"]))

    def sentence(self) -> str:
        """What this task shows."""
        row, gain = self.headline, self.headline.gain
        value = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        over = f"{gain.over} {row.value - gain.value:.3f}" if gain else "no control"
        said = f"{self.task} {value} (best control: {over})"
        if self.unbeaten:
            said = f"{self.task}: {PROMPT_ONLY} ({value}, not above {', '.join(self.unbeaten)})"
        if self.constant is not None:
            said += f"; it answers {self.constant!r} to nearly everything"
        return said

    def details(self) -> Json:
        oracle = self.answers.said["oracle"]
        judged = constancy([answer.text for answer in oracle], [item.target for item in self.items])
        return {
            "n": len(self.items),
            "problems": len(set(self.clusters.tolist())),
            "reads_activations": not self.unbeaten,
            "not_above": self.unbeaten,
            "intervals_apart": self.apart,
            "over_linear_probe": _span(self.over_linear_probe) if self.over_linear_probe else None,
            "constancy": judged._asdict(),
            "positive_answer": self.answers.pair[1] if self.answers.pair else None,
        }

    def by_step(self, best: int) -> list[Json]:
        """The table step x task, the best checkpoint among them."""
        answers = {**self.answers.by_step, best: self.answers.said["oracle"]}
        return [{"step": step, "task": self.task, "best": step == best, **self._scored(said)} for step, said in sorted(answers.items())]

    def _scored(self, answers: Sequence[ProbeAnswer]) -> Json:
        return {metric: _span(self.estimate(metric, answers)) for metric in self.metrics}


def _word(metric: str) -> str:
    return {"exact_match": "exact match", "fuzzy_match": "fuzzy match", "macro_f1": "macro-F1", "auroc": "AUROC", "ece": "ECE"}[metric]


def _span(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval
    return {"value": estimate.value, "low": low, "high": high}


def verdict(tasks: Sequence[TaskScores], *, planted: bool) -> str:
    """One or two sentences: what is read from the activations, what is not."""
    read, unread = [task for task in tasks if not task.unbeaten], [task for task in tasks if task.unbeaten]
    parts = []
    if read:
        parts.append("Read from the activations: " + "; ".join(task.sentence() for task in read))
        if better := [task.task for task in read if (over := task.over_linear_probe) is not None and over.interval[1] < 0]:
            parts.append(f"A linear probe on the same activations reads {', '.join(better)} better than the oracle says it")
    else:
        parts.append("No task is read from the activations")
    if unread:
        parts.append("; ".join(task.sentence() for task in unread))
    text = ". ".join(parts)
    if planted:
        text += (
            ". The built-in model was trained to write and check these steps: its signals are planted, a positive control for the pipeline"
        )
    return f"{text}."


def not_supported(tasks: Sequence[TaskScores], *, planted: bool, text_only: bool, layers: Sequence[int]) -> list[str]:
    """What the numbers do not show."""
    lines = ["That the model uses what the oracle reads: nothing was intervened on."]
    lines.append("That the oracle knows what it cannot say, or says only what it reads: an answer beyond the tasks was not scored.")
    if planted:
        lines.append("Anything about reasoning models: the built-in model's signals were put there by its training.")
    if layers and max(layers) <= 1:
        lines.append(f"That more is read than the tokens asked about: their states at layer {max(layers)} nearly hold their identities.")
    if not_better := [t.task for t in tasks if t.over_linear_probe is not None and not t.over_linear_probe.interval[0] > 0]:
        lines.append(f"That asking beats a linear probe on the same activations: it does not on {', '.join(not_better)}.")
    if free := [task.task for task in tasks if task.over_linear_probe is None]:
        lines.append(f"A comparison with a linear probe on {', '.join(free)}: the answers are free text.")
    if not text_only:
        lines.append("A comparison with an adapter trained without activations: train_oracle.text_only_steps is 0.")
    return lines


def make_report(
    tasks: Sequence[TaskScores],
    *,
    job: str,
    experiment: str,
    planted: bool,
    text_only: bool,
    layers: Sequence[int],
    figure: str,
    details: Mapping[str, Any],
    best: int,
) -> Report:
    return Report(
        job=job,
        experiment=experiment,
        verdict=verdict(tasks, planted=planted),
        not_supported=not_supported(tasks, planted=planted, text_only=text_only, layers=layers),
        figures=[figure],
        rows=[row for task in tasks for row in task.rows()],
        details={
            **details,
            "tasks": {task.task: task.details() for task in tasks},
            "steps": [row for task in tasks for row in task.by_step(best)],
        },
    )
