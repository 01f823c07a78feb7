"""A report holds no number without interval, n and controls."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tribunal.core import reports
from tribunal.core.errors import DataError
from tribunal.core.records import Report
from tribunal.core.stats import Estimate


def estimate(value: float) -> Estimate:
    return Estimate(value, value + np.linspace(-0.1, 0.1, 201))


def report(**changes) -> Report:
    row = reports.row(
        "probe", "auroc", estimate(0.9), 10, controls={"length": estimate(0.7), "majority": estimate(0.5)}, rivals=["majority", "length"]
    )
    whole = {"job": "train_probes", "experiment": "x", "verdict": "Good.", "not_supported": [], "figures": [], "rows": [row]}
    return Report(**{**whole, **changes})


def test_the_gain_is_over_the_best_rival_and_paired():
    gain = report().rows[0].gain
    assert (gain.over, gain.value) == ("length", pytest.approx(0.2))
    assert gain.low == gain.high == pytest.approx(0.2)  # the same draws on both sides


def test_where_lower_is_better_a_lower_number_is_a_positive_gain():
    row = reports.row(
        "probe", "brier", estimate(0.1), 10, controls={"length": estimate(0.2), "majority": estimate(0.25)}, rivals=["majority", "length"]
    )
    assert (row.gain.over, row.gain.value) == ("length", pytest.approx(0.1))


def test_what_is_written_is_read_back(tmp_path):
    path = reports.write_report(tmp_path, report(details={"n": float("nan"), "tiny": 1 / 3}))
    assert reports.read_report(path).rows == report().rows
    assert json.loads(path.read_text())["details"] == {"n": None, "tiny": 0.333333}


def test_a_row_without_controls_or_a_figure_that_is_not_there_is_a_fault(tmp_path):
    bare = report().rows[0].model_copy(update={"controls": []})
    assert reports.faults(report(rows=[bare])) == ["row 'probe' (auroc): no control beside it"]
    with pytest.raises(AssertionError, match=r"figure a\.png is not there"):
        reports.write_report(tmp_path, report(figures=["a.png"]))


def test_an_unknown_control_or_a_file_of_another_version_is_named(tmp_path):
    strange = report().model_dump(mode="json")
    strange["rows"][0]["controls"][0]["name"] = "lenght"
    (tmp_path / "report.json").write_text(json.dumps(strange))
    with pytest.raises(DataError, match="unknown control 'lenght'"):
        reports.read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(json.dumps({**strange, "schema_version": 2}))
    with pytest.raises(DataError, match="schema_version"):
        reports.read_report(tmp_path / "report.json")
