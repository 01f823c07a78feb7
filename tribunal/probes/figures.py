"""``probe_results.png``: what the probes reach beside what is known without them, how the classes separate, how honest P is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from tribunal.core import plots
from tribunal.core.stats import ECE_BINS, Estimate, accuracy
from tribunal.probes.baselines import BASELINES
from tribunal.probes.crossfit import Floats
from tribunal.probes.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "probe_results.png"
LABELS = {"bag_of_words": "bag of words", "question_only": "question only", "logprob": "log-probability"}


def probe_results(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the four panels and write them."""
    figure, axes = plots.figure(2, 2, width=13, height=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _by_layer(axes[0, 0], evaluation, "auroc")
    _by_layer(axes[0, 1], evaluation, "accuracy")
    axes[0, 0].legend(loc="best", title="pooling", ncols=2)
    _separation(axes[1, 0], evaluation)
    _reliability(axes[1, 1], evaluation)
    plots.save(figure, path)


def _by_layer(axes: Axes, evaluation: Evaluation, metric: str) -> None:
    """Probes by layer on the left, the controls as points of their own on the right, all with 95 % intervals."""
    layers = sorted({cell.layer for cell in evaluation.cells})
    poolings = list(dict.fromkeys(cell.pooling for cell in evaluation.cells))
    for number, pooling in enumerate(poolings):
        cells = [cell for cell in evaluation.cells if cell.pooling == pooling]
        shift = 0.09 * (number - (len(poolings) - 1) / 2)
        places = [layers.index(cell.layer) + shift for cell in cells]
        style = {**plots.series(number), "label": pooling.replace("_", " ")}
        _points(axes, places, [evaluation.estimate(metric, evaluation.scores(cell)) for cell in cells], **style)
    controls = [name for name in BASELINES if name in evaluation.controls]
    wide = 0.7 * len(layers) / len(controls)  # the controls take less room than the layers
    start = len(layers) - 0.5 + wide
    estimates = [evaluation.estimate(metric, evaluation.control_scores(name)) for name in controls]
    _points(axes, [start + i * wide for i in range(len(controls))], estimates, color=plots.DARK, marker="D", linestyle="none")
    best = max(range(len(controls)), key=lambda i: estimates[i].value)
    axes.axhline(estimates[best].value, color=plots.DARK, linewidth=1, linestyle="--", zorder=1)
    axes.axvspan(start - 0.75 * wide, start + len(controls) * wide, color=plots.FAINT, alpha=0.5, linewidth=0, zorder=0)
    axes.set_xlim(-0.6, start + len(controls) * wide)
    every = len(layers) // 13 + 1
    ticks = [*range(0, len(layers), every), *(start + i * wide for i in range(len(controls)))]
    axes.set_xticks(ticks, [*map(str, layers[::every]), *(LABELS.get(name, name) for name in controls)])
    for label in axes.get_xticklabels()[-len(controls) :]:
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    word = {"auroc": "AUROC", "accuracy": "Accuracy"}[metric]
    plots.tidy(axes, f"{word}: probes by layer, and what needs no activation", "output of block", word)
    axes.xaxis.set_label_coords(0.5 * len(layers) / (start + len(controls) * wide), -0.08)


def _points(axes: Axes, places: list[float], estimates: list[Estimate], **style: Any) -> None:
    values = np.array([estimate.value for estimate in estimates])
    bounds = np.array([estimate.interval for estimate in estimates]).T
    axes.errorbar(places, values, yerr=np.abs(bounds - values), capsize=2, elinewidth=1, **style)


def _separation(axes: Axes, evaluation: Evaluation) -> None:
    logits, labels = evaluation.nested.logits, evaluation.labels[evaluation.nested.trace]
    low, high = np.quantile(logits, [0.005, 0.995])
    edges = np.linspace(min(low, -1.0), max(high, 1.0), 41).tolist()
    clipped = np.clip(logits, edges[0], edges[-1])
    for value, name, colour in ((0, "incorrect", plots.VERMILION), (1, "correct", plots.BLUE)):
        share = f"{name} (n = {int((labels == value).sum())})"
        axes.hist(clipped[labels == value], edges, color=colour, alpha=0.30, density=True)
        axes.hist(clipped[labels == value], edges, color=colour, histtype="step", linewidth=1.8, density=True, label=share)
    axes.axvline(0, color=plots.DARK, linewidth=1, linestyle=":")
    right = float(accuracy(logits, labels, np.ones((1, len(labels))))[0])
    axes.legend(loc="upper left", title=f"out of fold, accuracy {right:.3f}")
    axes.margins(y=0.25)
    plots.tidy(axes, "Separation: logit of the probe chosen in the folds", 'logit of "correct"', "density")


def _reliability(axes: Axes, evaluation: Evaluation) -> None:
    scores = evaluation.nested
    chance, labels = expit(scores.logits), evaluation.labels[scores.trace].astype(float)
    axes.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1, linestyle="--", label="perfect")
    middle, share, error = _bins(chance, labels)
    axes.errorbar(middle, share, yerr=error, color=plots.BLUE, marker="o", capsize=2, elinewidth=1, label="probe chosen in the folds")
    estimate = evaluation.estimate("ece", scores)
    brier = evaluation.estimate("brier", scores)
    low, high = estimate.interval
    text = f"ECE {estimate.value:.3f} [{low:.3f}, {high:.3f}]\nBrier {brier.value:.3f}\n{ECE_BINS} bins of equal mass"
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", va="bottom")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="upper left")
    plots.tidy(axes, "Reliability: is P(correct) the share that is correct?", "P(correct) by the probe", "share correct")


def _bins(chance: Floats, labels: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean forecast, share correct and 1.96 binomial standard errors, by bins of equal mass."""
    parts = np.array_split(np.argsort(chance, kind="stable"), min(ECE_BINS, len(chance)))
    middle, share = (np.array([values[part].mean() for part in parts]) for values in (chance, labels))
    return middle, share, 1.96 * np.sqrt(share * (1 - share) / np.array([len(part) for part in parts]))
