"""What best-of-N comes to over the problems: curves with intervals, paired gains, exact tests, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tribunal.core import plots, reports
from tribunal.core.records import Report, ReportRow
from tribunal.core.stats import Estimate, Resamples
from tribunal.probes.selection import EVERY_N_UP_TO, PROBE, WEIGHTED, Candidates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = dict[str, Any]
Floats = NDArray[np.float64]

FIGURE = "selection.png"
RIVALS = ("random_choice", "majority_vote", "logprob", "length")
CEILING = "best_possible"
OURS = {PROBE: "best of N by probe", WEIGHTED: "vote weighted by probe"}
DESCRIPTIONS = {
    "random_choice": "one of the N samples at random, unparsable and truncated ones too",
    "majority_vote": "the answer that most of the N samples give; ties are shared evenly",
    "logprob": "the answered sample with the highest mean log-probability of its readable tokens",
    "length": "the shortest answered sample",
    "best_possible": "an oracle: right where any of the N samples is (a ceiling, not a rival)",
    PROBE: "the answered sample with the highest held-out logit",
    WEIGHTED: "the answer with the largest sum of held-out P(correct) over the samples that give it",
}
MIN_PROBLEMS = 10
"""Problems that a verdict needs, and a stratum for rows of its own: a bootstrap over fewer says little."""


class Selection:
    """All numbers of one selection job.

    Args:
        records: what ``Candidates.record`` said of each problem.
        resamples: bootstrap resamples of problems.
    """

    def __init__(self, candidates: Candidates, records: Mapping[str, Json], *, resamples: int) -> None:
        self.candidates, self.sizes, self.n = candidates, candidates.sizes, candidates.n
        self.problems = [problem for problem in candidates.problems if problem in records]
        self.lost = len(candidates.problems) - len(self.problems)
        self.records = [records[problem] for problem in self.problems]
        known = set.intersection(*(set(record["curves"]) for record in self.records))
        self.selectors = [name for name in (*OURS, *RIVALS, CEILING) if name in known]
        self.curves = {name: np.array([record["curves"][name] for record in self.records]) for name in self.selectors}  # [problem, size]
        self.strata = np.array([record["stratum"] or "" for record in self.records])
        self.resamples = Resamples(self.problems, resamples, candidates.seed)
        self._known: dict[tuple[str, int, str | None], Estimate] = {}

    @property
    def rivals(self) -> list[str]:
        return [name for name in RIVALS if name in self.selectors]

    def estimate(self, selector: str, n: int, stratum: str | None = None) -> Estimate:
        """Accuracy over problems with its paired bootstrap."""
        key = selector, n, stratum
        if key not in self._known:
            rows = np.flatnonzero(self.strata == stratum) if stratum else np.arange(len(self.problems))
            values = self.curves[selector][rows, self.sizes.index(n)]
            self._known[key] = self.resamples.estimate(_mean, values, np.zeros(len(rows), dtype=np.int64), rows)
        return self._known[key]

    def row(self, selector: str, n: int, stratum: str | None = None) -> ReportRow:
        controls = {name: self.estimate(name, n, stratum) for name in (*self.rivals, CEILING)}
        ours = self.estimate(selector, n, stratum)
        count = int((self.strata == stratum).sum()) if stratum else len(self.problems)
        return reports.row(f"{OURS[selector]}, N={n}", "accuracy", ours, count, controls=controls, rivals=self.rivals, stratum=stratum)

    @cached_property
    def named_strata(self) -> list[str]:
        names, counts = np.unique(self.strata[self.strata != ""], return_counts=True)
        return [str(name) for name, count in zip(names, counts) if count >= MIN_PROBLEMS]

    def rows(self) -> list[ReportRow]:
        rows = [self.row(selector, self.n) for selector in OURS]
        rows += [self.row(selector, self.n, stratum) for selector in OURS for stratum in self.named_strata]
        rows += [self.row(selector, n) for selector in OURS for n in self.sizes if 1 < n < self.n]
        return rows

    def exact_tests(self) -> list[Json]:
        """McNemar's exact test for both ways of using the probe against every rival, each problem decided on its first N samples."""
        chosen = [name for name in self.selectors if name in self.records[0]["picks"]]
        picks = {name: np.array([record["picks"][name] for record in self.records]) for name in chosen}
        found = []
        for ours in OURS:
            for rival in self.rivals:
                if rival in picks:
                    won = int(((picks[ours] == 1) & (picks[rival] == 0)).sum())
                    lost = int(((picks[ours] == 0) & (picks[rival] == 1)).sum())
                    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
                    found.append({"selector": OURS[ours], "against": rival, "only_ours_right": won, "only_theirs_right": lost, "p": p})
        return found

    # In words -----------------------------------------------------------------------------------------------------------

    def verdict(self, *, planted: bool) -> str:
        first = self._compared(PROBE, f"With N = {self.n} samples of each of {len(self.problems)} problems, handing in the probe's choice")
        second = self._compared(WEIGHTED, "The vote weighted by the probe")
        one, best = (100 * self.estimate(name, self.n).value for name in ("random_choice", CEILING))
        third = f"One sample alone: {one:.1f} %; an oracle among the {self.n}: {best:.1f} %"
        if planted:
            third += "; the signal is planted by this model's training (a positive control for the pipeline)"
        return f"{first}. {second}. {third}."

    def _compared(self, selector: str, subject: str) -> str:
        row = self.row(selector, self.n)
        assert row.gain is not None
        name, low, high = row.gain.over, 100 * row.gain.low, 100 * row.gain.high
        test = next((test for test in self.exact_tests() if test["selector"] == OURS[selector] and test["against"] == name), None)
        span = f"{100 * row.gain.value:+.1f} points [{low:+.1f}, {high:+.1f}]"
        if test is not None:
            span += f"; McNemar {test['only_ours_right']} : {test['only_theirs_right']} problems, p = {test['p']:.2g}"
        rival = f"{name} ({100 * (row.value - row.gain.value):.1f} %"
        value = f"{100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        if len(self.problems) < MIN_PROBLEMS:
            return f"{subject} is right on {value}, against {rival}; {span}): too few problems to say which is better"
        if low > 0:
            word = "better than the best control,"
        elif high < 0:
            word = "worse than"
        else:
            word = "no better than"
        beaten = {rival: self.estimate(selector, self.n).minus(self.estimate(rival, self.n)).interval[0] > 0 for rival in self.rivals}
        either = [rival for rival in self.rivals if not beaten[rival] and rival != name]
        also = f", nor better than {' or '.join(either)}" if either else ""
        return f"{subject} is right on {value}: {word} {rival}; {span}){also}"

    def not_supported(self, *, planted: bool) -> list[str]:
        lines = [
            "Selection without labels: the probe was trained on graded traces of other problems; vote, log-probability and length were not."
        ]
        if planted:
            lines.append("Anything about reasoning models: the built-in model was trained to notice its slips, so the signal is planted.")
        lines.append(
            "Problems of another dataset, difficulty or model: scores are held out by problem, not by dataset (see transfer_probes)."
        )
        lines.append(f"More than {self.n} samples per problem, or another sampling temperature: none was tried.")
        if "logprob" not in self.selectors:
            lines.append("A comparison with logprob: these traces carry no log-probabilities.")
        if not self.named_strata:
            lines.append(f"A difference between difficulties: no stratum has {MIN_PROBLEMS} problems.")
        lines += [f"Every problem: {reason} and were left out." for reason in self.candidates.left_out]
        lines += [f"Every problem: {self.lost} ended the process and were set aside."] if self.lost else []
        return lines

    def details(self) -> Json:
        samples = sum(record["samples"] for record in self.records)
        return {
            "n": self.n,
            "sizes": self.sizes,
            "problems": len(self.problems),
            "samples": samples,
            "samples_without_an_answer": samples - sum(record["answered"] for record in self.records),
            "problems_mixed": sum(0 < record["right"] < record["samples"] for record in self.records),
            "without_an_answer": "wrong, without a vote, chosen by no score; random_choice may take it, so part of any gain over "
            "random_choice is the gain of having an answer",
            "curves": {name: [self._interval(name, n) for n in self.sizes] for name in self.selectors},
            "mcnemar": {"rule": "each problem decided on its first N samples, ties to the earlier one", "tests": self.exact_tests()},
            "subsets": {"most": self.candidates.subsets, "drawn_where_there_are_more": self._drawn},
            "selectors": {name: DESCRIPTIONS[name] for name in self.selectors},
            "held_out": "scores of the cell chosen without the problem's fold (nested_logit)",
        }

    @property
    def _drawn(self) -> list[int]:
        """The values of N whose votes were averaged over drawn subsets for some problem."""
        most = max(record["samples"] for record in self.records)
        return [n for n in self.sizes if comb(most, n) > self.candidates.subsets]

    def _interval(self, name: str, n: int) -> Json:
        estimate = self.estimate(name, n)
        low, high = estimate.interval
        return {"n": n, "value": estimate.value, "low": low, "high": high}

    def report(self, *, experiment: str, planted: bool) -> Report:
        return Report(
            job="select_answers",
            experiment=experiment,
            verdict=self.verdict(planted=planted),
            not_supported=self.not_supported(planted=planted),
            figures=[FIGURE],
            rows=self.rows(),
            details=self.details(),
        )


def _mean(values_N: Floats, _: NDArray[np.int64], weights_RN: Floats) -> Floats:
    total = weights_RN.sum(1)
    return np.divide(weights_RN @ values_N, total, out=np.full(len(weights_RN), np.nan), where=total > 0)


def publish(candidates: Candidates, records: Mapping[str, Json], out: Path, *, experiment: str, resamples: int) -> None:
    """Write report.json and selection.png into ``out``."""
    selection = Selection(candidates, records, resamples=resamples)
    planted = candidates.held_out.file.planted
    draw(selection, out / FIGURE, title=f"{experiment}: which sample to hand in" + ("  (planted signal)" if planted else ""))
    reports.write_report(out, selection.report(experiment=experiment, planted=planted))


def draw(selection: Selection, path: Path, *, title: str) -> None:
    """Accuracy against N for every selector, and the paired gains at the largest N."""
    lines = len(selection.rivals) * (1 + len(selection.named_strata))
    figure, axes = plots.figure(1, 2, width=13, height=max(5.0, 1 + 0.25 * lines))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _curves(axes[0, 0], selection)
    _gains(axes[0, 1], selection)
    plots.save(figure, path)


def _label(name: str) -> str:
    return OURS.get(name, name.replace("_", " "))


def _curves(axes: Axes, selection: Selection) -> None:
    middle = (len(selection.selectors) - 1) / 2
    for number, name in enumerate(selection.selectors):
        estimates = [selection.estimate(name, n) for n in selection.sizes]
        values = np.array([estimate.value for estimate in estimates])
        bounds = np.array([estimate.interval for estimate in estimates]).T
        style = {"color": plots.GREY, "marker": None, "linestyle": "--"} if name == CEILING else plots.series(number)
        shift = 1 + 0.012 * (number - middle)
        places = [n * shift for n in selection.sizes]
        axes.errorbar(places, values, yerr=np.abs(bounds - values), label=_label(name), capsize=2, elinewidth=1, **style)
    if selection.n > EVERY_N_UP_TO:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xticks(selection.sizes)
    axes.legend(loc="best")
    plots.tidy(
        axes,
        f"Accuracy against N ({len(selection.problems)} problems, 95 %)",
        "N samples to choose among",
        "share of problems answered right",
    )


def _gains(axes: Axes, selection: Selection) -> None:
    groups: Sequence[str | None] = [None, *selection.named_strata]
    lines = [(group, rival) for group in groups for rival in selection.rivals]
    for number, ours in enumerate(OURS):
        gains = [
            selection.estimate(ours, selection.n, group).minus(selection.estimate(rival, selection.n, group)) for group, rival in lines
        ]
        values = np.array([gain.value for gain in gains])
        bounds = np.array([gain.interval for gain in gains]).T
        places = np.arange(len(lines))[::-1] + 0.16 * (1 - 2 * number)
        style = {**plots.series(number), "linestyle": "none", "capsize": 2, "elinewidth": 1}
        axes.errorbar(values, places, xerr=np.abs(bounds - values), label=OURS[ours], **style)
    axes.axvline(0, color=plots.DARK, linewidth=1, linestyle=":")
    names = [f"{group or 'all'}: over {_label(rival)}" for group, rival in lines]
    axes.set_yticks(np.arange(len(lines))[::-1], names)
    axes.grid(axis="x")
    plots.tidy(axes, f"Paired gain of the two at N = {selection.n}, 95 %", "difference in accuracy", "")
