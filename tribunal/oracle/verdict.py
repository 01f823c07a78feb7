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
from tribunal.oracle.evaluation import BEST, Who
from tribunal.oracle.examples import Example
from tribunal.oracle.probe import ProbeAnswer
from tribunal.oracle.scoring import Constancy, constancy, exact, fuzzy, said_choice
from tribunal.oracle.tasks.task import task_class

RIVALS = ("majority", "text_only", "shuffled", "zeroed")
"""What can be said without reading the activations. The linear probe reads them too: it stands beside, and is no rival."""
PROMPT_ONLY = "reads the prompt, not the activations"
WRONG_WAY = "its log-odds separate the answers, the wrong way round"
EXACT, FUZZY, AUROC = "exact_match", "fuzzy_match", "auroc"
MIN_PROBLEMS = 10
"""Held-out problems that a word on what is read needs: a bootstrap over fewer calls guesses a finding."""
WORDS = {EXACT: "exact match", FUZZY: "fuzzy match", "macro_f1": "macro-F1", AUROC: "AUROC", "ece": "ECE"}


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
        said: answers by condition or control; ``oracle``, ``shuffled`` and ``zeroed`` are those of ``who``.
        pair: the two answers of a task that has two, the positive one last.
    """

    task: str
    items: Sequence[Example]
    said: Mapping[str, Sequence[ProbeAnswer]]
    pair: tuple[str, str] | None
    who: Who = BEST


class TaskScores:
    """The numbers of one adapter on one task."""

    def __init__(self, answers: TaskAnswers, resamples: Resamples) -> None:
        self.answers, self.resamples = answers, resamples
        self.task, self.items, self.who = answers.task, answers.items, answers.who
        self.clusters = resamples.index([item.group for item in self.items])
        self.classes = sorted({item.target for item in self.items})
        self.labels = np.array([self.classes.index(item.target) for item in self.items], dtype=np.int64)
        self._estimates: dict[tuple[str, str], Estimate] = {}

    @property
    def metrics(self) -> list[str]:
        closed = ["macro_f1"] if self.items[0].choices else []
        return [EXACT, FUZZY, *closed, *([AUROC, "ece"] if self.answers.pair and len(self.classes) == 2 else [])]

    @property
    def judged_by(self) -> list[str]:
        """What can show that the activations are read, in this order: exact words (free text has none), other words, log-odds."""
        return [metric for metric in self.metrics if metric in ((EXACT, FUZZY, AUROC) if self.items[0].choices else (FUZZY,))]

    def estimate(self, metric: str, condition: str) -> Estimate:
        """A metric of what was said under a condition; NaN where it cannot have it."""
        if (metric, condition) not in self._estimates:
            self._estimates[metric, condition] = self._estimate(metric, self.answers.said[condition])
        return self._estimates[metric, condition]

    def _estimate(self, metric: str, answers: Sequence[ProbeAnswer]) -> Estimate:
        if metric in (AUROC, "ece"):
            assert self.answers.pair is not None
            odds = [answer.odds for answer in answers]
            if any(value is None for value in odds):
                return Estimate(float("nan"), np.full(len(self.resamples.counts_RG), np.nan))
            positive = np.array([item.target == self.answers.pair[1] for item in self.items], dtype=np.int64)
            return self.resamples.estimate(stats.METRICS[metric], np.array(odds, dtype=float), positive, self.clusters)
        if metric == "macro_f1":
            said = np.array([self._class(answer.text) for answer in answers], dtype=float)
            return self.resamples.estimate(macro_f1, said, self.labels, self.clusters)
        pairs = zip(answers, self.items)
        if metric == EXACT:
            scores = [float(exact(answer.text, item.target)) for answer, item in pairs]
        else:
            scores = [fuzzy(self.task, answer.text, item.target, item.choices) for answer, item in pairs]
        return self.resamples.estimate(mean, np.array(scores), self.labels, self.clusters)

    def _class(self, text: str) -> int:
        named = said_choice(self.task, text, self.items[0].choices)
        return self.classes.index(named) if named in self.classes else -1

    def controls(self, metric: str) -> dict[str, Estimate]:
        return {name: self.estimate(metric, name) for name in (*RIVALS, "linear_probe") if name in self.answers.said}

    def rows(self) -> list[ReportRow]:
        """Of the best checkpoint every metric, of a published adapter those that judge it, of a kept step the first of them."""
        metrics = self.metrics if self.who == BEST else self.judged_by if self.who.adapter is not None else self.judged_by[:1]
        return [self.row(metric) for metric in metrics]

    def row(self, metric: str) -> ReportRow:
        name = ", ".join(filter(None, (self.task, WORDS[metric], self.who.name)))
        controls = self.controls(metric)
        return report_row(name, metric, self.estimate(metric, "oracle"), len(self.items), controls=controls, rivals=RIVALS)

    # In words -----------------------------------------------------------------------------------------------------------

    @property
    def headline(self) -> ReportRow:
        """Of the match that the task is judged by first: exact for one with choices, fuzzy for free text."""
        return self.row(self.judged_by[0])

    def unbeaten(self, metric: str) -> list[str]:
        """The rivals that the oracle does not beat (95 %, paired), of those that have the metric."""
        ours, controls = self.estimate(metric, "oracle"), self.controls(metric)
        known = [name for name in RIVALS if name in controls and controls[name].known]
        return [name for name in known if not ours.minus(controls[name]).interval[0] > 0]

    @property
    def too_few(self) -> bool:
        """Whether the items are of too few problems to say what is read."""
        return len(set(self.clusters.tolist())) < MIN_PROBLEMS

    @cached_property
    def read_by(self) -> str | None:
        """The first metric by which the oracle beats every rival, so that it reads the activations; None where there is none."""
        if self.too_few:
            return None
        return next((metric for metric in self.judged_by if not self.unbeaten(metric)), None)

    @cached_property
    def inverted(self) -> bool:
        """Whether its log-odds tell the answers apart, below chance and below every rival's: something is read, and said wrong."""
        if self.too_few or AUROC not in self.judged_by:
            return False
        ours, controls = self.estimate(AUROC, "oracle"), self.controls(AUROC)
        rivals = [controls[name] for name in RIVALS if name in controls and controls[name].known]
        return ours.interval[1] < 0.5 and all(ours.minus(rival).interval[1] < 0 for rival in rivals)

    @property
    def apart(self) -> bool:
        """Whether the oracle's interval lies above that of every rival."""
        headline = self.headline
        return all(headline.low > control.high for control in headline.controls if control.name in RIVALS)

    @cached_property
    def constancy(self) -> Constancy:
        return constancy([answer.text for answer in self.answers.said["oracle"]], [item.target for item in self.items])

    @property
    def compared_by(self) -> str:
        """The metric that the task is read by, the first that judges it where it is not read."""
        return self.read_by or self.judged_by[0]

    @property
    def over_linear_probe(self) -> Estimate | None:
        """The oracle's lead over the probe by ``compared_by``; None for free answers, which no probe gives."""
        if "linear_probe" not in self.answers.said:
            return None
        return self.estimate(self.compared_by, "oracle").minus(self.estimate(self.compared_by, "linear_probe"))

    def sentence(self) -> str:
        """What this task shows."""
        first = self.judged_by[0]
        missed = f"{self._number(first)}, not above {', '.join(self.unbeaten(first))}"
        if self.too_few:
            count = len(set(self.clusters.tolist()))
            found = f"{self._number(first)}, {self._best_control(first)}"
            said = f"{self.task}: {count} held-out problems are too few to say what it reads ({found})"
        elif self.read_by is None:
            what = f"{WRONG_WAY} (AUROC {self._number(AUROC)}; " if self.inverted else f"{PROMPT_ONLY} ("
            said = f"{self.task}: {what}{missed})"
        elif self.read_by == first:
            said = f"{self.task} {self._number(first)} ({self._best_control(first)})"
        else:
            what = "its words do not use what its log-odds separate" if self.read_by == AUROC else "right in other words than the target's"
            by = f"{WORDS[self.read_by]} {self._number(self.read_by)}, {self._best_control(self.read_by)}"
            said = f"{self.task}: {what} ({by}; {WORDS[first]} {missed})"
        if self.constancy.constant:
            said += f"; it answers {self.constancy.answer!r} to nearly everything"
        return said

    def _number(self, metric: str) -> str:
        row = self.row(metric)
        return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"

    def _best_control(self, metric: str) -> str:
        row = self.row(metric)
        return f"best control: {row.gain.over} {row.value - row.gain.value:.3f}" if row.gain else "no control"

    def details(self) -> Json:
        return {
            "n": len(self.items),
            "problems": len(set(self.clusters.tolist())),
            "reads_activations": self.read_by is not None,
            "read_by": self.read_by,
            "inverted": self.inverted,
            "not_above": self.unbeaten(self.judged_by[0]),
            "intervals_apart": self.apart,
            "over_linear_probe": _span(self.over_linear_probe) if self.over_linear_probe else None,
            "constancy": self.constancy._asdict(),
            "positive_answer": self.answers.pair[1] if self.answers.pair else None,
        }

    def all_metrics(self) -> Json:
        return {metric: _span(self.estimate(metric, "oracle")) for metric in self.metrics}


def _span(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval
    return {"value": estimate.value, "low": low, "high": high}


def verdict(scores: Sequence[TaskScores], *, planted: bool) -> str:
    """What the best checkpoint reads from the activations and what it does not, then a sentence on each published adapter."""
    parts = finding([task for task in scores if task.who == BEST])
    for adapter in dict.fromkeys(task.who.adapter for task in scores if task.who.adapter is not None):
        found = finding([task for task in scores if task.who.adapter == adapter])
        parts.append(f"Adapter {adapter}: " + "; ".join(part[0].lower() + part[1:] for part in found))
    if planted:
        parts.append(
            "The built-in model was trained to write and check these steps: its signals are planted, a positive control for the pipeline"
        )
    return f"{'. '.join(parts)}."


def finding(tasks: Sequence[TaskScores]) -> list[str]:
    """What one adapter shows, in parts."""
    unspoken = [task for task in tasks if task.read_by == AUROC]
    said = [task for task in tasks if task.read_by not in (AUROC, None)]
    if said:
        parts = ["Read from the activations: " + "; ".join(task.sentence() for task in said)]
    elif tasks and all(task.too_few for task in tasks):
        parts = []  # that no task is read would be a finding, too
    else:
        parts = ["No task is read from the activations" + (" in words" if unspoken else "")]
    if better := [task for task in (*said, *unspoken) if (over := task.over_linear_probe) is not None and over.interval[1] < 0]:
        parts.append(f"A linear probe on the same activations reads {_compared(better)} better than the oracle does")
    if impossible := [task.task for task in (*said, *unspoken) if task_class(task.task).unreadable]:
        parts.append(f"Nothing can tell {', '.join(impossible)}: look for a leak before anything here is believed")
    if others := [*unspoken, *(task for task in tasks if task.read_by is None)]:
        parts.append("; ".join(task.sentence() for task in others))
    return parts


def _compared(tasks: Sequence[TaskScores]) -> str:
    return ", ".join(f"{task.task} ({WORDS[task.compared_by]})" for task in tasks)


def not_supported(
    tasks: Sequence[TaskScores], *, planted: bool, control: Sequence[str], layers: Sequence[int], set_aside: Sequence[str]
) -> list[str]:
    """What the numbers do not show; ``control`` are the lines about text_only."""
    lines = ["That the model uses what the oracle reads: nothing was intervened on."]
    lines.append("That the oracle knows what it cannot say, or says only what it reads: an answer beyond the tasks was not scored.")
    if planted:
        lines.append("Anything about reasoning models: the built-in model's signals were put there by its training.")
    if layers and max(layers) <= 1:
        lines.append(f"That more is read than the tokens asked about: their states at layer {max(layers)} nearly hold their identities.")
    if few := [task.task for task in tasks if task.too_few]:
        lines.append(f"Whether the oracle reads {', '.join(few)}: that takes items of {MIN_PROBLEMS} held-out problems.")
    if not_better := [t for t in tasks if t.over_linear_probe is not None and not t.over_linear_probe.interval[0] > 0]:
        lines.append(f"That asking beats a linear probe on the same activations: it does not on {_compared(not_better)}.")
    if free := [task.task for task in tasks if task.over_linear_probe is None]:
        lines.append(f"A comparison with a linear probe on {', '.join(free)}: the answers are free text.")
    lines += control
    if set_aside:
        lines.append(f"Anything about {', '.join(set_aside)}: answers ended the process and were set aside.")
    return lines


def make_report(
    scores: Sequence[TaskScores],
    *,
    job: str,
    experiment: str,
    planted: bool,
    control: Sequence[str],
    layers: Sequence[int],
    figure: str,
    details: Mapping[str, Any],
    best: int,
    set_aside: Sequence[str] = (),
) -> Report:
    """Rows and words of all adapters: the best checkpoint's (step ``best``) first, then published ones, then other steps.

    Args:
        set_aside: "<adapter or step> on <task>" of those that have no scores because answers were set aside.
    """
    tasks = [task for task in scores if task.who == BEST]
    published = [task for task in scores if task.who.adapter is not None]
    steps = [task for task in scores if task.who.step is not None]
    adapters: dict[str, Json] = {}
    for task in published:
        adapters.setdefault(str(task.who.adapter), {})[task.task] = task.details()
    order = [task.task for task in tasks]
    table = [(order.index(task.task), best if task.who == BEST else task.who.step, task) for task in (*tasks, *steps)]
    return Report(
        job=job,
        experiment=experiment,
        verdict=verdict(scores, planted=planted),
        not_supported=not_supported(tasks, planted=planted, control=control, layers=layers, set_aside=set_aside),
        figures=[figure],
        rows=[row for task in (*tasks, *published, *steps) for row in task.rows()],
        details={
            **details,
            "tasks": {task.task: task.details() for task in tasks},
            "adapters": adapters,
            "steps": [
                {"step": step, "task": task.task, "best": task.who == BEST, **task.all_metrics()}
                for _, step, task in sorted(table, key=lambda entry: entry[:2])
            ],
        },
    )
