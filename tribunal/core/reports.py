"""Make, check and write ``report.json``: no number without its interval, its n and its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tribunal.core.errors import DataError
from tribunal.core.records import Gain, Interval, Report, ReportRow
from tribunal.core.stats import LOWER_IS_BETTER, Estimate
from tribunal.core.storage import read_json, write_json

REPORT = "report.json"
DIGITS = 6
CONTROLS = (
    "majority", "length", "finish", "bag_of_words", "question_only", "layer_0", "logprob", "permuted_labels", "shuffled_labels",
    "random_directions", "majority_vote", "text_only", "shuffled", "zeroed", "linear_probe", "separate_oracle", "diff_of_means",
    "random_choice", "best_possible", "pause", "no_cot", "swapped_latents", "zeroed_latents", "no_steering", "text_reader",
)  # fmt: skip
"""Names of controls, shared by all jobs."""


def rounded(value: float) -> float:
    """Six significant digits; -0.0 is 0.0."""
    return float(f"{value:.{DIGITS}g}") + 0.0


def interval(name: str, estimate: Estimate) -> Interval:
    """A control's number with its interval."""
    low, high = estimate.interval
    return Interval(name=name, value=rounded(estimate.value), low=rounded(low), high=rounded(high))


def gain_over(name: str, metric: str, ours: Estimate, theirs: Estimate) -> Gain:
    """How much better ours is, paired; positive is better, for metrics where lower is better too."""
    difference = theirs.minus(ours) if metric in LOWER_IS_BETTER else ours.minus(theirs)
    low, high = difference.interval
    return Gain(over=name, value=rounded(difference.value), low=rounded(low), high=rounded(high))


def best_control(metric: str, controls: Mapping[str, Estimate], among: Sequence[str]) -> str | None:
    """The control with the best number; the first in order on a tie, None where none of ``among`` is there."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    known = [name for name in among if name in controls and controls[name].known]
    return max(known, key=lambda name: sign * controls[name].value) if known else None


def row(
    name: str,
    metric: str,
    estimate: Estimate,
    n: int,
    *,
    controls: Mapping[str, Estimate],
    rivals: Sequence[str],
    stratum: str | None = None,
) -> ReportRow:
    """A row of the report, its gain taken over the best of ``rivals``.

    Args:
        controls: paired estimates of the controls, by their shared names; those without a value are left out.
    """
    low, high = estimate.interval
    rival = best_control(metric, controls, rivals)
    return ReportRow(
        name=name,
        metric=metric,
        value=rounded(estimate.value),
        low=rounded(low),
        high=rounded(high),
        n=n,
        stratum=stratum,
        controls=[interval(control, value) for control, value in controls.items() if value.known],
        gain=gain_over(rival, metric, estimate, controls[rival]) if rival else None,
    )


def faults(report: Report) -> list[str]:
    """What a report must not do, one sentence each."""
    found = []
    for line in report.rows:
        name = f"row '{line.name}' ({line.metric})"
        numbers = [line.value, line.low, line.high, *(v for c in line.controls for v in (c.value, c.low, c.high))]
        if not all(math.isfinite(number) for number in numbers):
            found.append(f"{name}: a number is not finite")
        if line.low > line.high:
            found.append(f"{name}: low {line.low} is above high {line.high}")
        if line.n < 1:
            found.append(f"{name}: n is {line.n}")
        if not line.controls:
            found.append(f"{name}: no control beside it")
        found += [f"{name}: unknown control '{c.name}'" for c in line.controls if c.name not in CONTROLS]
    if not report.verdict.strip():
        found.append("verdict: empty")
    return found


def write_report(folder: Path, report: Report) -> Path:
    """Write ``report.json``; figures must already lie beside it."""
    missing = [name for name in report.figures if not (folder / name).is_file()]
    wrong = faults(report) + [f"figure {name} is not there" for name in missing]
    assert not wrong, "; ".join(wrong)
    path = folder / REPORT
    write_json(path, plain(report.model_dump(mode="json")))
    return path


def read_report(path: Path) -> Report:
    """Raises DataError that names file and field."""
    try:
        report = Report.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}; is it of another version?") from None
    if wrong := faults(report):
        raise DataError(f"{path}: {wrong[0]}")
    return report


def plain(value: Any) -> Any:
    """Numbers rounded, throughout a JSON value (NaN becomes null)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return rounded(value) if math.isfinite(value) else None
    return value
