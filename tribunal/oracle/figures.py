"""Figures of the oracle's two jobs: its training, and what it reads beside its controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tribunal.core import plots
from tribunal.core.records import ReportRow

TRAINING, RESULTS = "training.png", "oracle_results.png"
SMOOTHING = 25
Json = dict[str, Any]


def training(rows: Sequence[Json], validation: Sequence[Json], steps: int, path: Path, *, title: str) -> None:
    """Loss by step of both adapters, and the score of each task at every validation."""
    figure, axes = plots.figure(1, 2, width=12, height=4.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    runs = {
        "with activations": [(row["step"], row["loss"]) for row in rows if row["step"] <= steps],
        "nothing injected (text_only)": [(row["step"] - steps, row["loss"]) for row in rows if row["step"] > steps],
    }
    for number, (name, points) in enumerate(runs.items()):
        if points:
            x, y = np.array(points).T
            colour = plots.SERIES[number]
            axes[0, 0].plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes[0, 0].plot(*_smooth(x, y), color=colour, label=name)
    axes[0, 0].legend(loc="best", title=f"mean of {SMOOTHING} steps")
    axes[0, 0].set_yscale("log")
    plots.tidy(axes[0, 0], "Loss of the answers", "optimizer step", "cross-entropy, nats per token")
    at = [row["step"] for row in validation]
    for number, task in enumerate(validation[0]["tasks"]):
        scores = [row["tasks"][task]["score"] for row in validation]
        n = validation[0]["tasks"][task]["n"]
        axes[0, 1].plot(at, scores, label=f"{task} (n = {n})", **plots.series(number))
    best = max(validation, key=lambda row: (row["score"], -row["loss"], -row["step"]))["step"]
    axes[0, 1].axvline(best, color=plots.DARK, linewidth=1, linestyle=":")
    axes[0, 1].set_ylim(-0.02, 1.04)
    axes[0, 1].legend(loc="best", title=f"best: step {best}")
    plots.tidy(axes[0, 1], "Validation: score of each task", "optimizer step", "share right (fuzzy); free answers: word-F1")
    plots.save(figure, path)


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = min(SMOOTHING, len(y))
    return x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid")


def results(rows: Sequence[ReportRow], by_step: Sequence[Json], path: Path, *, title: str) -> None:
    """What the oracle gets right on each task beside its controls, with 95 % intervals, and the score by kept step.

    Args:
        rows: the headline of each task at the chosen step: exact match, of free answers F1 over words.
        by_step: {"step", "task", <metric>: {"value", "low", "high"}}, with the metric of the task's headline at least.
    """
    figure, axes = plots.figure(1, 2, width=13, height=4.8, width_ratios=[2, 1])
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    names = ["oracle", *dict.fromkeys(control.name for row in rows for control in row.controls)]
    for number, name in enumerate(names):
        shift = 0.8 / len(names) * (number - (len(names) - 1) / 2)
        points = []
        for place, row in enumerate(rows):
            found = [row] if name == "oracle" else [control for control in row.controls if control.name == name]
            points += [(place + shift, one.value, one.low, one.high) for one in found]
        x, value, low, high = np.array(points).T
        error = np.abs(np.array([low, high]) - value)
        axes[0, 0].errorbar(
            x, value, yerr=error, linestyle="none", capsize=2, elinewidth=1, label=name.replace("_", " "), **plots.series(number)
        )
    metric_of = {row.name.partition(",")[0]: row.metric for row in rows}
    notes = ["" if metric == "exact_match" else "F1 of words, " for metric in metric_of.values()]
    axes[0, 0].set_xticks(range(len(rows)), [f"{task}\n({note}n = {row.n})" for task, note, row in zip(metric_of, notes, rows)])
    axes[0, 0].set_ylim(-0.03, 1.05)
    axes[0, 0].legend(loc="best", ncols=2)
    what = "Score" if any(notes) else "Exact match"
    plots.tidy(axes[0, 0], f"{what} on held-out problems", "", "share right")
    for number, task in enumerate(dict.fromkeys(row["task"] for row in by_step)):
        mine = [row for row in by_step if row["task"] == task]
        values = np.array([[row[metric_of[task]][key] for key in ("value", "low", "high")] for row in mine])
        error = np.abs(values[:, 1:].T - values[:, 0])
        axes[0, 1].errorbar(
            [row["step"] for row in mine], values[:, 0], yerr=error, capsize=2, elinewidth=1, label=task, **plots.series(number)
        )
    axes[0, 1].set_ylim(-0.03, 1.05)
    axes[0, 1].legend(loc="best")
    plots.tidy(axes[0, 1], "The same by kept checkpoint", "optimizer step", "")
    plots.save(figure, path)
