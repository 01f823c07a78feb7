"""``monitor.png``: what the running score tells, and when. ``early_exit.png``: what giving up early buys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tribunal.core import plots
from tribunal.probes.early_exit import AT_THE_END, MONITOR, RANDOM
from tribunal.probes.monitor_evaluation import RECALIBRATED, MonitorEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tribunal.core.records import ReportRow

MONITOR_PNG, EXIT_PNG = "monitor.png", "early_exit.png"
NAMES = {
    MONITOR: "running score",
    RECALIBRATED: "running score, recalibrated by position",
    AT_THE_END: "whole traces only",
    "logprob": "log-probability so far",
    "length": "tokens so far",
    "majority": "majority",
    RANDOM: "random",
}
LOOKS: dict[str, dict[str, Any]] = {
    MONITOR: {"color": plots.BLUE, "marker": "o"},
    RECALIBRATED: {"color": plots.SKY, "marker": "P"},
    AT_THE_END: {"color": plots.GREEN, "marker": "^"},
    "logprob": {"color": plots.VERMILION, "marker": "s"},
    "length": {"color": plots.PURPLE, "marker": "D"},
    RANDOM: {"color": plots.GREY, "marker": "X"},
    "majority": {"color": plots.GREY, "marker": "X"},
}


def draw(evaluation: MonitorEvaluation, out: Path, *, title: str) -> list[str]:
    """Write the figures; returns their names."""
    figure, axes = plots.figure(2, 2, width=13, height=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    shares = {percent: rows for percent, rows in evaluation.share_rows.items()}
    _by_position(axes[0, 0], shares, "auroc")
    plots.tidy(axes[0, 0], "AUROC along the trace", "share of the trace, %", "AUROC")
    axes[0, 0].legend(loc="best")
    _by_position(axes[0, 1], evaluation.token_rows, "auroc")
    plots.tidy(axes[0, 1], "AUROC among the traces still alive", "tokens so far (traces alive)", "AUROC")
    alive = {position: len(at.traces_N) for position, at in evaluation.at_tokens.items()}
    axes[0, 1].set_xticks(list(alive), [f"{position}\n({count})" for position, count in alive.items()], fontsize=8)
    _signal(axes[1, 0], evaluation)
    _by_position(axes[1, 1], shares, "brier")
    plots.tidy(axes[1, 1], "Brier score along the trace (lower is better)", "share of the trace, %", "Brier score")
    plots.save(figure, out / MONITOR_PNG)
    if evaluation.early_exit is None:
        return [MONITOR_PNG]
    figure, axes = plots.figure(1, 2, width=13, height=5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _exit(axes[0, 0], evaluation)
    _decided(axes[0, 1], evaluation)
    plots.save(figure, out / EXIT_PNG)
    return [MONITOR_PNG, EXIT_PNG]


def _by_position(axes: Axes, rows_at: dict[int, list[ReportRow]], metric: str) -> None:
    rows = {place: row for place, found in rows_at.items() for row in found if row.metric == metric and row.stratum is None}
    if not rows:
        return
    names = [control.name for control in next(iter(rows.values())).controls]
    for number, name in enumerate([MONITOR, *names]):
        found = [row if name == MONITOR else next(c for c in row.controls if c.name == name) for row in rows.values()]
        values = np.array([row.value for row in found])
        bounds = np.abs(np.array([[row.low, row.high] for row in found]).T - values)
        step = 0.008 * (max(rows) - min(rows))
        places = np.array(list(rows)) + step * (number - len(names) / 2)
        axes.errorbar(places, values, yerr=bounds, capsize=2, elinewidth=1, label=NAMES[name], **LOOKS[name])


def _signal(axes: Axes, evaluation: MonitorEvaluation) -> None:
    for name, colour in (("incorrect", plots.VERMILION), ("correct", plots.BLUE)):
        curve = evaluation.curves[name]
        count = int((evaluation.labels == (name == "correct")).sum())
        axes.fill_between(curve["percent"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve["percent"], curve["mean"], color=colour, label=f"{name} traces (n = {count})")
    axes.set_ylim(0, 1)
    axes.legend(loc="best")
    plots.tidy(axes, "Mean running score", "share of the trace, %", "P(correct) so far")


def _exit(axes: Axes, evaluation: MonitorEvaluation) -> None:
    early = evaluation.early_exit
    assert early is not None
    for name, curve in early.curves.items():
        tokens, right = curve.tokens_PT.mean(0) / early.one_P.mean(), curve.right_PT.mean(0)
        best = int(np.argmax(right)) + 1  # beyond, good samples are given up as well
        axes.plot(tokens[:best], right[:best], label=NAMES[name], markersize=3.5, **LOOKS[name])
    for name, marker in ((MONITOR, "*"), ("logprob", "*")):
        if name in early.policies:
            tokens_P, right_P = early.best_of_all(name)
            place = tokens_P.mean() / early.one_P.mean()
            axes.plot([place], [right_P.mean()], marker=marker, markersize=12, linestyle="none", color=LOOKS[name]["color"])
            axes.annotate(
                "all samples, best score", (place, right_P.mean()), textcoords="offset points", xytext=(-6, 6), ha="right", fontsize=8
            )
    axes.legend(loc="lower right")
    plots.tidy(axes, "Giving up early: accuracy by tokens spent", "tokens per answer, in whole traces", "accuracy")


def _decided(axes: Axes, evaluation: MonitorEvaluation) -> None:
    for name, shares in evaluation.decided.items():
        ordered = np.sort(shares)
        axes.step(100 * ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=NAMES[name], color=LOOKS[name]["color"])
    axes.set_xlim(0, 100)
    axes.legend(loc="upper left")
    plots.tidy(axes, "When the verdict is final", "share of the trace, %", "traces decided by then")
