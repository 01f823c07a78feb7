"""What an attribution found: ``contributions.jsonl``, ``report.json`` and ``attribution.png``.

Everything here is measured on the half of the problems that did not rank the components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tribunal.core import plots
from tribunal.core.records import Interval, Report, ReportRow
from tribunal.core.reports import interval, rounded, write_report
from tribunal.core.stats import Estimate, Resamples, auroc
from tribunal.core.storage import write_jsonl
from tribunal.core.work import Journal
from tribunal.models.components import Component
from tribunal.probes.attribution import NONE, TOP, Floats, Gathered, Inputs, choose, gap, random_conditions

Ints = NDArray[np.int64]
FIGURE = "attribution.png"
TABLE = "contributions.jsonl"
SHOWN = 15
RARE = 0.05
"""Share of the random sets that may do as much to the signal as the top components, where these are said to matter more."""
PLANTED = "The built-in model was trained to notice its slips: the signal is planted, a positive control for the pipeline."


def gap_metric(values_N: Floats, labels_N: Ints, weights_RN: Floats) -> Floats:
    """Weighted mean over right traces minus that over wrong ones, [R]."""
    means = []
    for label in (1, 0):
        weights = weights_RN * (labels_N == label)
        total = weights.sum(1)
        means.append(np.divide(weights @ values_N, total, out=np.full(len(total), np.nan), where=total > 0))
    return means[0] - means[1]


def share_metric(values_N: Floats, labels_N: Ints, weights_RN: Floats) -> Floats:
    """Weighted mean of ``values_N``, [R]; labels play no part."""
    total = weights_RN.sum(1)
    return np.divide(weights_RN @ values_N, total, out=np.full(len(total), np.nan), where=total > 0)


class Findings:
    """Estimates of one attribution.

    Args:
        components: all writers, in the order of the contributions.
        records: finished units by key.
    """

    def __init__(self, inputs: Inputs, gathered: Gathered, components: Sequence[Component], records: Journal, *, bootstrap: int) -> None:
        self.inputs, self.gathered, self.components, self.records = inputs, gathered, list(components), records
        measured = ~inputs.ranking[gathered.rows_N]
        self.rows_N = gathered.rows_N[measured]
        self.labels_N = inputs.labels[self.rows_N]
        problems = [inputs.problem_ids[row] for row in self.rows_N]
        self.resamples = Resamples(sorted({*problems, *(attempt.problem.id for attempt in inputs.attempts)}), bootstrap, inputs.seed)
        self.clusters_N = self.resamples.index(problems)
        self.parts_NC, self.random_NCR = gathered.parts_NC[measured], gathered.random_NCR[measured]
        self.logits_N = gathered.signal_N[measured] + inputs.biases[self.rows_N]
        self.chosen = choose(components, inputs, gathered)
        self.conditions = [NONE, TOP, *random_conditions(inputs.settings)]

    def part(self, number: int) -> Estimate:
        """What a component writes of the gap in logits."""
        return self.resamples.estimate(gap_metric, self.parts_NC[:, number], self.labels_N, self.clusters_N)

    @cached_property
    def parts(self) -> list[Estimate]:
        return [self.part(number) for number in range(len(self.components))]

    @cached_property
    def total(self) -> Estimate:
        return self.resamples.estimate(gap_metric, self.logits_N, self.labels_N, self.clusters_N)

    @cached_property
    def bias(self) -> Estimate:
        """What the probes' biases add to the gap: they differ between folds."""
        return self.resamples.estimate(gap_metric, self.inputs.biases[self.rows_N], self.labels_N, self.clusters_N)

    @property
    def rest(self) -> float:
        """The largest difference, in logits, between a trace's signal and the sum of its parts."""
        return float(np.abs(self.gathered.parts_NC.sum(1) - self.gathered.signal_N).max())

    def along_random(self, number: int | None) -> Interval:
        """The same gap along random directions of equal length: mean and 95 % range over them (None: of the whole stream)."""
        values_NR = self.random_NCR.sum(1) if number is None else self.random_NCR[:, number]
        return spread("random_directions", gap(values_NR, self.labels_N))

    @cached_property
    def logits(self) -> dict[str, tuple[Ints, Floats]]:
        """Numbers of the measured traces and their logits under each condition: traces that all conditions have.

        A condition whose units were all given up has none, and takes none from the others.
        """
        found = {NONE: (np.arange(len(self.rows_N)), self.logits_N)}
        place = {row: i for i, row in enumerate(self.rows_N)}
        for condition in self.conditions[1:]:
            rows, values = [], []
            for item in self.inputs.plan():
                if (item.kind, item.condition) == ("signal", condition) and item.keys[0] in self.records:
                    numbers = np.arange(len(self.inputs.pairs))[self.inputs.shard(item.number)]
                    kept = [(place[n], v) for n, v in zip(numbers, self.records[item.keys[0]]["signal"], strict=True) if n in place]
                    rows += [n for n, _ in kept]
                    values += [v for _, v in kept]
            found[condition] = np.array(rows, dtype=np.int64), np.array(values)
        shared = set(range(len(self.rows_N))).intersection(*(rows.tolist() for rows, _ in found.values() if len(rows)))
        ours = {name: np.isin(rows, sorted(shared)) for name, (rows, _) in found.items()}
        return {name: (rows[ours[name]], values[ours[name]]) for name, (rows, values) in found.items()}

    def signal(self, condition: str, metric: Any) -> Estimate:
        rows, values = self.logits[condition]
        return self.resamples.estimate(metric, values, self.labels_N[rows], self.clusters_N[rows])

    @cached_property
    def answers(self) -> dict[str, tuple[Ints, Floats, Floats]]:
        """Clusters of the attempts, 1 where the answer is right, and tokens, by condition: attempts that all conditions have.

        A condition whose units were all given up has none, and takes none from the others.
        """
        found = {}
        done = {c: {a.key for a in self.inputs.attempts if f"answers/{c}/{a.key}" in self.records} for c in self.conditions}
        shared = [a for a in self.inputs.attempts if all(a.key in keys for keys in done.values() if keys)]
        for condition in self.conditions:
            kept = [(a.problem.id, self.records[f"answers/{condition}/{a.key}"]) for a in shared if done[condition]]
            right = np.array([float(record["verdict"] == "correct") for _, record in kept])
            tokens = np.array([float(record["tokens"]) for _, record in kept])
            found[condition] = self.resamples.index([problem for problem, _ in kept]), right, tokens
        return found

    def accuracy(self, condition: str) -> Estimate:
        clusters, right, _ = self.answers[condition]
        return self.resamples.estimate(share_metric, right, np.zeros(len(right), dtype=np.int64), clusters)

    # Report -----------------------------------------------------------------------------------------------------------

    def report(self, *, experiment: str, planted: bool) -> Report:
        return Report(
            job="attribute_direction",
            experiment=experiment,
            verdict=self.verdict(planted),
            not_supported=[
                "That a top component reads or computes correctness: direct attribution says where the signal is written, not why.",
                "Parts of components that act through later ones: only what is written straight into the stream is counted.",
                "That the ablated components serve the signal alone: "
                + ("the answers change with them." if self._hurts else "an effect on answers within the interval is not excluded."),
                *([f"Every trace and answer: {self.lost} units ended the process and were set aside."] if self.lost else []),
                *([PLANTED + " Nothing here speaks of reasoning models."] if planted else []),
            ],
            figures=[FIGURE],
            rows=self.rows(),
            details={
                "layer": self.inputs.held_out.place.layer,
                "pooling": self.inputs.held_out.place.pooling,
                "components": len(self.components),
                "largest_rest_in_logits": self.rest,
                "ablated": {condition: [component.name for component in chosen] for condition, chosen in self.chosen.items() if chosen},
                "random_sets_that_lower_the_auroc_as_much": self._as_low,
                "traces": {"ranking": int(self.inputs.ranking.sum()), "measured": len(self.rows_N)},
                "mean_tokens_of_answers": {name: float(tokens.mean()) for name, (_, _, tokens) in self.answers.items() if len(tokens)},
            },
        )

    def rows(self) -> list[ReportRow]:
        n = len(self.rows_N)
        along_random = self.along_random(None)
        found = [
            self._row("all components and the probes' biases", "logit_gap", self.total, n, [along_random]),
            self._row("the probes' biases, which differ between folds", "logit_gap", self.bias, n, [along_random]),
        ]
        for number in self.order:
            found.append(self._row(self.components[number].name, "logit_gap", self.parts[number], n, [self.along_random(number)]))
        for metric, function in (("auroc", auroc), ("logit_gap", gap_metric)):
            estimates = {condition: self.signal(condition, function) for condition in self.conditions}
            found.append(self._ablation(metric, estimates, len(self.logits[TOP][0])))
        found.append(self._ablation("accuracy", {c: self.accuracy(c) for c in self.conditions}, len(self.answers[TOP][1])))
        return [row for row in found if row is not None]

    @property
    def order(self) -> list[int]:
        """Components by the size of their part, largest first."""
        return sorted(range(len(self.components)), key=lambda i: (-abs(self.parts[i].value), i))

    def _row(self, name: str, metric: str, estimate: Estimate, n: int, controls: list[Interval]) -> ReportRow | None:
        if not estimate.known or not n:
            return None
        low, high = estimate.interval
        return ReportRow(
            name=name, metric=metric, value=rounded(estimate.value), low=rounded(low), high=rounded(high), n=n, controls=controls
        )

    def _ablation(self, metric: str, estimates: Mapping[str, Estimate], n: int) -> ReportRow | None:
        controls = [interval("no_steering", estimates[NONE])] if estimates[NONE].known else []
        random = [estimates[c].value for c in random_conditions(self.inputs.settings) if estimates[c].known]
        if random:
            controls.append(spread("random_choice", np.array(random)))
        if not controls:
            return None
        return self._row(f"top {len(self.chosen[TOP])} ablated, {metric}", metric, estimates[TOP], n, controls)

    def verdict(self, planted: bool) -> str:
        named = [f"{component.name} ({self.parts[self.components.index(component)].value:+.2f})" for component in self.chosen[TOP]]
        low, high = self.total.interval
        first = (
            f"Right and wrong traces differ by {self.total.value:.2f} logits [{low:.2f}, {high:.2f}] along the direction, of which the "
            f"components ranked first on other problems write: {_listed(named)}"
        )
        lost = self._compared("the signal's AUROC", self.signal(NONE, auroc), self.signal(TOP, auroc), self._random_auroc)
        if self._as_low is not None:
            lost += f", {self._as_low} of {len(random_conditions(self.inputs.settings))} random sets lower it as much"
        accuracy = self._compared("the accuracy of new answers", self.accuracy(NONE), self.accuracy(TOP), self._random_mean(self.accuracy))
        if self._broken:
            last = "Even random sets break the answers, so accuracy cannot tell what the top components are for"
        elif self._falls and self._hurts:
            last = "So what they do for the signal cannot be told from what they do for the task"
        elif self._falls:
            last = "So the signal leans on them more than on others; that the answers do is not shown"
        elif self._hurts:
            last = "So the answers lean on them more than on others; that the signal does is not shown"
        else:
            last = "So they are not shown to matter more than random ones"
        return f"{first}. With them ablated, {lost}; {accuracy}. {last}." + (f" {PLANTED}" if planted else "")

    def _random_mean(self, of: Any) -> Estimate:
        estimates = [known for condition in random_conditions(self.inputs.settings) if (known := of(condition)).known]
        if not estimates:
            return Estimate(float("nan"), np.full(len(self.resamples.counts_RG), np.nan))
        return Estimate(float(np.mean([e.value for e in estimates])), np.mean([e.draws for e in estimates], axis=0))

    @property
    def _random_auroc(self) -> Estimate:
        return self._random_mean(lambda condition: self.signal(condition, auroc))

    @cached_property
    def _as_low(self) -> int | None:
        """How many random sets lower the signal's AUROC as much as the top ones; None where it isn't known."""
        top, random = self.signal(TOP, auroc), [self.signal(c, auroc) for c in random_conditions(self.inputs.settings)]
        known = [estimate.value for estimate in random if estimate.known]
        return sum(value <= top.value for value in known) if top.known and known else None

    @property
    def _falls(self) -> bool:
        """The signal falls more than under random ablations on average, and more than under nearly every one of them."""
        if self._as_low is None or self._as_low > RARE * len(random_conditions(self.inputs.settings)):
            return False
        return self.signal(TOP, auroc).minus(self._random_auroc).interval[1] < 0

    @property
    def _hurts(self) -> bool:
        """The answers suffer more than under random ablations."""
        return self.accuracy(TOP).minus(self._random_mean(self.accuracy)).interval[1] < 0

    @property
    def lost(self) -> int:
        """Units that were given up."""
        return sum(key not in self.records for item in self.inputs.plan() for key in item.keys)

    @property
    def _broken(self) -> bool:
        """Random ablations leave less than half of the right answers."""
        return self._random_mean(self.accuracy).value < self.accuracy(NONE).value / 2

    @staticmethod
    def _compared(what: str, none: Estimate, top: Estimate, random: Estimate) -> str:
        if not (none.known and top.known and random.known):
            return f"{what} is not known, its units were set aside"
        low, high = top.minus(random).interval
        return (
            f"{what} goes from {none.value:.3f} to {top.value:.3f} (random sets of as many: {random.value:.3f}; difference "
            f"{top.value - random.value:+.3f} [{low:+.3f}, {high:+.3f}])"
        )

    # Files ------------------------------------------------------------------------------------------------------------

    def publish(self, out: Path, *, experiment: str, planted: bool) -> None:
        write_jsonl(out / TABLE, (self._line(number) for number in self.order))
        self.draw(out / FIGURE, experiment)
        write_report(out, self.report(experiment=experiment, planted=planted))

    def _line(self, number: int) -> dict[str, Any]:
        component, estimate, random = self.components[number], self.parts[number], self.along_random(number)
        low, high = estimate.interval
        return {
            "component": component.name,
            "kind": component.kind,
            "layer": component.layer if component.layer >= 0 else None,
            "head": component.head if component.head >= 0 else None,
            "logit_gap": rounded(estimate.value),
            "low": rounded(low),
            "high": rounded(high),
            "random_low": random.low,
            "random_high": random.high,
            "ablated": component in self.chosen[TOP],
        }

    def draw(self, path: Path, experiment: str) -> None:
        figure, axes = plots.figure(1, 3, width=13, height=5, width_ratios=[1.6, 1, 1])
        place = self.inputs.held_out.place
        figure.suptitle(
            f"{experiment}: who writes the direction of layer {place.layer}, {place.pooling}", x=0.01, ha="left", fontweight="bold"
        )
        shown = self.order[:SHOWN]
        left = axes[0, 0]
        for height, number in enumerate(reversed(shown)):
            estimate, random = self.parts[number], self.along_random(number)
            left.plot([random.low, random.high], [height, height], color=plots.FAINT, linewidth=9, solid_capstyle="butt", zorder=1)
            colour = plots.VERMILION if self.components[number] in self.chosen[TOP] else plots.BLUE
            left.errorbar([estimate.value], [height], xerr=_bars(estimate), fmt="o", color=colour)
        left.axvline(0, color=plots.GREY, linewidth=1)
        left.set_yticks(range(len(shown)), [self.components[number].name for number in reversed(shown)])
        left.grid(axis="x")
        plots.tidy(left, "Part of the gap right - wrong", "logits (orange: ablated; band: random directions)", "")
        for axis, title, of in (
            (axes[0, 1], "Signal on the same texts", lambda condition: self.signal(condition, auroc)),
            (axes[0, 2], "New answers", self.accuracy),
        ):
            values = [of(condition).value for condition in random_conditions(self.inputs.settings)]
            for number, condition in enumerate((NONE, TOP)):
                estimate = of(condition)
                axis.errorbar([number], [estimate.value], yerr=_bars(estimate), fmt="o", color=plots.DARK)
            axis.plot(np.full(len(values), 2.0), values, linestyle="none", **plots.series(0))
            axis.set_xticks([0, 1, 2], ["as it is", f"top {len(self.chosen[TOP])}\nablated", "random sets\nablated"])
            axis.set_xlim(-0.5, 2.5)
            plots.tidy(axis, title, "", "AUROC" if axis is axes[0, 1] else "accuracy")
        plots.save(figure, path)


def spread(name: str, values: Floats) -> Interval:
    """Mean and 95 % range of a control over its random instances."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(name=name, value=rounded(float(values.mean())), low=rounded(float(low)), high=rounded(float(high)))


def _bars(estimate: Estimate) -> list[list[float]]:
    """The interval as matplotlib's distances from the value."""
    low, high = estimate.interval
    return [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
