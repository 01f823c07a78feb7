"""An experiment's page: its jobs, its labels, and each measuring job's verdict beside its controls, in one file.

Nothing here knows a job: whatever writes a ``report.json`` gets a section. What is read is in ``sources``, how things are
named and written in ``words``, the look in ``templates/``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tribunal import __version__
from tribunal.core.records import VERDICTS, Report, ReportRow
from tribunal.core.reports import CONTROLS
from tribunal.core.stats import LOWER_IS_BETTER
from tribunal.report import intervals, words
from tribunal.report.rendering import data_uri, render
from tribunal.report.sources import ClassCount, Finished, Sources, read

MAIN_ROWS = 10
"""So many of a report's rows stand open; jobs write the most important ones first."""
PLANTED = "builtin:"
"""Models whose signal was trained into them: positive controls."""


def build(
    results: Path, *, pipelines: Mapping[str, Sequence[str]], unfinished: Mapping[str, str] | None = None, leave_out: Iterable[str] = ()
) -> str:
    """The page, as HTML.

    Args:
        results: the experiment's folder of results.
        pipelines: jobs in their order, by pipeline; says what is missing.
        unfinished: what is known of jobs that have begun and not finished.
        leave_out: jobs to say nothing of (the one that makes the page).
    Raises:
        UserError: nothing has finished there, or a file is not the one that its receipt names.
    """
    sources = read(results, leave_out=leave_out)
    measured = [sources.jobs[job] for job in in_order(sources.jobs) if sources.jobs[job].report is not None]
    groups, not_begun = job_groups(sources, pipelines, unfinished or {}, set(leave_out))
    sections = [section(one) for one in measured]
    return render(
        "report.html.j2",
        words=words,
        experiment=sources.experiment,
        facts=facts(sources),
        planted=str(sources.described("model").get("name", "")).startswith(PLANTED),
        groups=groups,
        any_gpu=any(row.gpu for _, rows in groups for row in rows),
        not_begun=not_begun,
        set_aside=[(one.job, one.receipt.get("set_aside") or []) for one in sources.jobs.values() if one.receipt.get("set_aside")],
        labels=labels(sources),
        sections=sections,
        stale=[part.heading for part in sections if part.stale],
        controls=[(name, words.CONTROLS.get(name, "")) for name in known_controls(measured)],
        version=__version__,
    )


def in_order(jobs: Iterable[str]) -> list[str]:
    """Jobs in the order of ``words.HEADINGS``, unknown ones last by name."""
    places = {job: place for place, job in enumerate(words.HEADINGS)}
    return sorted(jobs, key=lambda job: (places.get(job, len(places)), job))


def facts(sources: Sources) -> list[tuple[str, str]]:
    """What stands below the title: (name, text)."""
    model, dataset = sources.described("model"), sources.described("dataset")
    found = []
    if model:
        more = [str(model["revision"])[:12]] if model.get("revision") else []
        more += [str(model["dtype"])] if model.get("dtype") else []
        more += [f"adapter {Path(str(model['adapter'])).name}"] if model.get("adapter") else []
        found.append(("Model", ", ".join([str(model["name"]), *more])))
    if dataset:
        given = {key: value for key, value in dataset.items() if key != "name" and value is not None}
        found.append(("Dataset", ", ".join([str(dataset["name"]), *(f"{words.plain(key).lower()} {_short(given[key])}" for key in given)])))
    if (summary := sources.summary) is not None:
        found.append(("Traces", f"{words.several(summary.traces, 'trace')} of {words.several(summary.problems, 'problem')}"))
    hardware = sorted({str(one.receipt["hardware"]) for one in sources.jobs.values() if one.receipt.get("hardware")})
    found.append(("Hardware", "; ".join(hardware)))
    found.append(("Code", _codes(one.receipt.get("code") or {} for one in sources.jobs.values())))
    ended = max(one.ended for one in sources.jobs.values())
    found.append(("Last result", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ended)) if ended else ""))
    return [(name, text) for name, text in found if text]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_short(one) for one in value)
    text = str(value)
    return Path(text).name if "/" in text else text


def _codes(codes: Iterable[Mapping[str, Any]]) -> str:
    """Versions of the code, each with the commits that ran."""
    commits: dict[str, set[str]] = {}
    for code in codes:
        if code.get("version"):
            commits.setdefault(str(code["version"]), set()).update([str(code["commit"])[:10]] if code.get("commit") else [])
    return "; ".join(f"{version} ({', '.join(sorted(found))})" if found else version for version, found in sorted(commits.items()))


# Jobs -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRow:
    """A line of the table of jobs; ``state`` is finished, stale, unfinished or missing."""

    job: str
    state: str
    why: str = ""
    units: str = ""
    starts: str = ""
    took: str = ""
    gpu: str = ""
    set_aside: int = 0
    digest: str = ""


def job_groups(
    sources: Sources, pipelines: Mapping[str, Sequence[str]], unfinished: Mapping[str, str], leave_out: set[str]
) -> tuple[list[tuple[str, list[JobRow]]], list[tuple[str, str]]]:
    """Lines of the jobs' table by pipeline, and the pipelines of which nothing has begun with their jobs."""
    groups, not_begun, placed = [], [], set(leave_out)
    for pipeline, names in pipelines.items():
        jobs = [job for job in names if job not in placed]
        placed |= set(jobs)
        if any(job in sources.jobs or job in unfinished for job in jobs):
            groups.append((words.plain(pipeline), [job_row(job, sources, unfinished) for job in jobs]))
        elif jobs:
            not_begun.append((words.plain(pipeline), ", ".join(jobs)))
    others = in_order(({*sources.jobs, *unfinished}) - placed)
    if others:
        groups.append(("Other jobs", [job_row(job, sources, unfinished) for job in others]))
    return groups, not_begun


def job_row(job: str, sources: Sources, unfinished: Mapping[str, str]) -> JobRow:
    one = sources.jobs.get(job)
    if one is None:
        return JobRow(job, "unfinished", unfinished[job]) if job in unfinished else JobRow(job, "missing")
    totals = one.receipt["totals"]
    return JobRow(
        job,
        "stale" if one.stale else "finished",
        one.stale,
        units=words.several(totals["units"], one.unit),
        starts=words.count(totals["generations"]),
        took=words.duration(totals["seconds"]),
        gpu=words.duration(one.gpu_seconds) if one.gpu_seconds else "",
        set_aside=len(one.receipt.get("set_aside") or []),
        digest=str(one.receipt["digest"])[:10],
    )


# Labels -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTable:
    """The audit of the labels: sentences, warnings, and counts by class (``strata``: the same within each)."""

    sentences: list[str]
    warnings: list[str]
    classes: list[tuple[str, ClassCount]]
    strata: list[tuple[str, list[tuple[str, ClassCount]]]]


def labels(sources: Sources) -> LabelTable | None:
    """None where nothing was sampled or labelled."""
    audit, summary = sources.audit, sources.summary
    if audit is None and summary is None:
        return None
    said, warnings = [], []
    if summary is not None:
        said.append(
            f"{words.several(summary.attempted, 'trace')} attempted, {words.count(summary.dropped)} dropped, "
            f"{words.count(summary.traces)} kept: {words.several(summary.tokens, 'token')}"
            + (f", {words.number(summary.tokens_mean, 1)} a trace." if summary.tokens_mean is not None else ".")
        )
        warnings += summary.warnings
    if audit is None:
        return LabelTable(said, warnings, [], [])
    said.append(f"{words.several(audit.problems_with_both, 'problem')} of {words.count(audit.problems)} have right and wrong traces.")
    if (graders := audit.graders) is not None:
        said.append(f"A second grader agrees on {words.count(graders.agree)} of {words.several(graders.checked, 'trace')} checked.")
    strata = [(stratum, _classes(by_class)) for stratum, by_class in sorted(audit.strata.items())]
    return LabelTable(said, list(dict.fromkeys([*warnings, *audit.warnings])), _classes(audit.verdicts), strata)


def _classes(by_class: Mapping[str, ClassCount]) -> list[tuple[str, ClassCount]]:
    order = [*(name for name in VERDICTS if name in by_class), *sorted(set(by_class) - set(VERDICTS))]
    return [(name, by_class[name]) for name in order]


# Measuring jobs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number with its interval, as text; ``sign`` of a gain: 1 or -1 where its interval leaves zero out, else 0."""

    name: str
    value: str
    interval: str
    sign: int = 0


@dataclass(frozen=True)
class Line:
    """A row of a report, ready to be shown."""

    name: str
    stratum: str
    n: str
    number: Number
    own: intervals.Mark
    controls: list[tuple[Number, intervals.Mark]]
    rival: str
    gain: Number | None

    @property
    def best(self) -> Number:
        """The control that the gain is over; where there is no gain, the one with the best number."""
        return next((control for control, _ in self.controls if control.name == self.rival), self.controls[0][0])

    def beside(self, name: str) -> Number | None:
        return next((control for control, _ in self.controls if control.name == name), None)


@dataclass(frozen=True)
class MetricGroup:
    """Lines with one metric, on one scale."""

    metric: str
    lower_is_better: bool
    ticks: list[intervals.Tick]
    lines: list[Line]
    controls: list[str]


@dataclass(frozen=True)
class Section:
    """What the page says of one measuring job."""

    job: str
    heading: str
    stale: str
    verdict: str
    not_supported: list[str]
    headline: MetricGroup | None
    main: list[MetricGroup]
    every: list[MetricGroup]
    rows: int
    figures: list[tuple[str, str, str]]

    @property
    def any_gain(self) -> bool:
        return any(line.gain for group in self.main for line in group.lines)


def section(one: Finished) -> Section:
    report = one.report
    assert report is not None
    rows = report.rows
    main = rows if len(rows) <= MAIN_ROWS + 2 else rows[:MAIN_ROWS]
    return Section(
        job=one.job,
        heading=words.heading(one.job),
        stale=one.stale,
        verdict=report.verdict,
        not_supported=report.not_supported,
        headline=next(iter(metric_groups(rows[:1])), None),
        main=metric_groups(main),
        every=metric_groups(rows),
        rows=len(rows),
        figures=[(words.plain(Path(name).stem), name, data_uri(one.file(name))) for name in report.figures],
    )


def metric_groups(rows: Sequence[ReportRow]) -> list[MetricGroup]:
    """Rows by metric, in the order in which they first come."""
    by_metric: dict[str, list[ReportRow]] = {}
    for row in rows:
        by_metric.setdefault(row.metric, []).append(row)
    groups = []
    for metric, members in by_metric.items():
        scale, lower = intervals.scale(members), metric in LOWER_IS_BETTER
        lines = [line(row, scale, -1 if lower else 1) for row in members]
        names = {control.name for row in members for control in row.controls}
        groups.append(MetricGroup(words.metric(metric), lower, scale.drawn_ticks(), lines, [name for name in CONTROLS if name in names]))
    return groups


def line(row: ReportRow, scale: intervals.Scale, better: int) -> Line:
    gain = None
    if row.gain is not None:
        sign = 1 if row.gain.low > 0 else -1 if row.gain.high < 0 else 0
        gain = Number(row.gain.over, *words.interval(row.gain.value, row.gain.low, row.gain.high, signed=True), sign)
    return Line(
        name=row.name,
        stratum=row.stratum or "",
        n=words.count(row.n),
        number=Number(row.name, *words.interval(row.value, row.low, row.high)),
        own=scale.mark(row.name, row.value, row.low, row.high),
        controls=[
            (
                Number(control.name, *words.interval(control.value, control.low, control.high)),
                scale.mark(control.name, control.value, control.low, control.high),
            )
            for control in intervals.controls_first_the_best(row, better)
        ],
        rival=row.gain.over if row.gain is not None else "",
        gain=gain,
    )


def known_controls(measured: Iterable[Finished]) -> list[str]:
    """The controls that appear, in the order of ``reports.CONTROLS``."""
    reports: list[Report] = [one.report for one in measured if one.report is not None]
    names = {control.name for report in reports for row in report.rows for control in row.controls}
    return [name for name in CONTROLS if name in names]
