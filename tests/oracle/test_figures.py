"""The figure of what an oracle reads shows each task by the metric that it is judged by, and says which that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tribunal.core import plots
from tribunal.core.records import Interval, ReportRow
from tribunal.oracle import figures


def row(task: str, metric: str) -> ReportRow:
    control = Interval(name="majority", value=0.1, low=0.1, high=0.1)
    return ReportRow(name=f"{task}, match", metric=metric, value=0.4, low=0.3, high=0.5, n=9, stratum=None, controls=[control], gain=None)


@pytest.mark.parametrize("free", [False, True])
def test_free_answers_are_shown_by_their_f1_over_words_and_not_called_exact(monkeypatch, free):
    shown = []
    monkeypatch.setattr(plots, "save", lambda figure, path: shown.append(figure))
    rows = [row("carry", "exact_match"), *([row("context_prediction", "fuzzy_match")] if free else [])]
    by_step = [
        {"step": step, "task": one.name.partition(",")[0]}
        | {metric: dict.fromkeys(("value", "low", "high"), value) for metric, value in (("exact_match", 0.0), ("fuzzy_match", 0.4))}
        for one in rows
        for step in (1, 2)
    ]
    figures.results(rows, by_step, Path("unused.png"), title="t")
    left, right = shown[0].axes
    assert left.get_title(loc="left").startswith("Score" if free else "Exact match")
    labels = [text.get_text() for text in left.get_xticklabels()]
    assert labels == ["carry\n(n = 9)", "context_prediction\n(F1 of words, n = 9)"][: 1 + free]
    lines = [container.lines[0].get_ydata().tolist() for container in right.containers]
    assert lines == [[0.0, 0.0], [0.4, 0.4]][: 1 + free]
