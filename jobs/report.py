"""One page of an experiment: its jobs, its labels, every verdict beside its controls, from whatever has finished.

    python -m jobs.report experiments/demo.yaml

Reads receipts, every job's report.json and figures, label_traces' audit and generate_traces' summary; writes report.html, and
the same page as results/<experiment>/report.html (docs/files.md). Run again after new results, it is made anew.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tribunal.cluster.job import Job, root
from tribunal.core import registry
from tribunal.core.config import NO_EFFECT_ON_RESULTS, Section, SlurmJob
from tribunal.core.storage import write_atomic
from tribunal.core.work import Json, OverItems, Work, one_record

NAME, PAGE = "report", "report.html"


class Config(Section):
    """When the page is made; what is on it depends on the results alone."""

    after: list[str] = Field(
        [],
        description="jobs to wait for under SLURM, given up ones left out; submit names those that it queues",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )


class ReportPage(Job[Config]):
    name = NAME
    uses = ()
    resources = SlurmJob(time="0:20:00", nodes=1, gpus=0, cpus=1, mem_gb=4)
    reads_all = True
    _shown: dict[str, str | None] | None = None

    def inputs(self) -> dict[str, str | None]:
        return self._finished() if self._shown is None else self._shown

    @property
    def after(self) -> tuple[str, ...]:
        return tuple(self.config.after)

    def check(self) -> None:
        for job in self.config.after:
            registry.load("jobs", job, "job")

    def build(self) -> Work:
        # the page takes a second, so publish() makes it, of what is there by then; the unit is that it can be made
        def process(key: str) -> Json:
            return {"bytes": len(page(self.experiment.name))}

        return OverItems([PAGE], keys=lambda key: [key], process=one_record(process, str), journal=self.journal, unit="page")

    def publish(self, out: Path) -> None:
        self._shown = self._finished()  # for the receipt: what comes from here on has the page made anew
        html = page(self.experiment.name)
        write_atomic(out / PAGE, html)
        write_atomic(self.results.parent / PAGE, html, beside=out)

    def _finished(self) -> dict[str, str | None]:
        from tribunal.report.sources import published

        return {job: receipt["digest"] for job, receipt in published(self.results.parent, leave_out=[NAME]).items()}


def page(experiment: str) -> str:
    """The page of an experiment, as HTML, of what has finished by now.

    Raises:
        UserError: nothing has, or a file is not the one that its receipt names.
    """
    from tribunal.cluster.launch import job_kind
    from tribunal.cluster.pipelines import PIPELINES
    from tribunal.cluster.status import unfinished
    from tribunal.report.page import build

    results, begun = root() / "results" / experiment, unfinished(experiment)
    known = registry.names("jobs")

    def shown(job: str) -> bool:
        return (results / job).exists() or job in begun or not (job in known and job_kind(job).only_if_read)

    pipelines = {name: [job for job in jobs if shown(job)] for name, jobs in PIPELINES.items()}
    return build(results, pipelines=pipelines, unfinished=begun, leave_out=[NAME])


def write_page(experiment: str) -> Path:
    """Make ``results/<experiment>/report.html`` now; the job's own folder stays as it is."""
    path = root() / "results" / experiment / PAGE
    write_atomic(path, page(experiment))
    return path


if __name__ == "__main__":
    from tribunal.cluster.launch import main

    main("report")
