"""What the page is made of: receipts, ``report.json`` files, the label audit and the summary of the traces; nothing else is read.

Each file is compared with the hash in its job's receipt before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tribunal.core import receipts
from tribunal.core.errors import CorruptError, DataError
from tribunal.core.records import Report
from tribunal.core.reports import REPORT, read_report
from tribunal.core.storage import read_json, sha256_file

AUDIT, SUMMARY = "audit.json", "summary.json"
Part = TypeVar("Part", bound=BaseModel)


class Loose(BaseModel):
    """The keys that the page shows, of a file that has more."""

    model_config = ConfigDict(extra="ignore")


class ClassCount(Loose):
    count: int
    share: float
    tokens_mean: float | None
    tokens_median: float | None
    finish: dict[str, int]


class Graders(Loose):
    agree: int
    checked: int


class Audit(Loose):
    """Of label_traces: how many traces of each class, by stratum, and how far the labels can be trusted."""

    traces: int
    problems: int
    problems_with_both: int
    verdicts: dict[str, ClassCount]
    strata: dict[str, dict[str, ClassCount]] = {}
    graders: Graders | None = None
    warnings: list[str] = []


class Summary(Loose):
    """Of generate_traces: what was sampled, and what was dropped."""

    problems: int
    planned: int
    attempted: int
    dropped: int
    traces: int
    tokens: int
    tokens_mean: float | None = None
    tokens_median: float | None = None
    tokens_max: float | None = None
    warnings: list[str] = []


@dataclass(frozen=True)
class Finished:
    """A finished job.

    Attributes:
        stale: why its results no longer belong to the others'; empty where they do.
        report: None where the job measures nothing.
    """

    job: str
    folder: Path
    receipt: Mapping[str, Any]
    stale: str = ""
    report: Report | None = None

    @property
    def unit(self) -> str:
        return next((row["unit"] for row in self.receipt["generations"] if row.get("unit")), "unit")

    @property
    def gpu_seconds(self) -> float:
        return sum((row.get("seconds") or 0) * (row.get("gpus") or 0) for row in self.receipt["generations"])

    @property
    def ended(self) -> float:
        """Seconds since 1970; 0 where the receipt does not tell."""
        return max((row.get("ended") or 0 for row in self.receipt["generations"]), default=0)

    def file(self, name: str) -> Path:
        """One of its files, as it was published.

        Raises:
            CorruptError: it is missing, or differs from what the receipt says.
        """
        path, known = self.folder / name, self.receipt["outputs"].get(name)
        if known is None or not path.is_file():
            raise CorruptError(
                f"{path}: {'missing' if known else 'not in the receipt'}; remove the folder {self.folder} and run {self.job} again"
            )
        if sha256_file(path) != known["sha256"]:
            raise CorruptError(f"{path} does not match the hash in its receipt; remove the folder {self.folder} and run {self.job} again")
        return path


@dataclass(frozen=True)
class Sources:
    """Everything that an experiment's page shows.

    Attributes:
        jobs: the finished ones, by name.
    """

    experiment: str
    jobs: dict[str, Finished] = field(default_factory=dict)
    audit: Audit | None = None
    summary: Summary | None = None

    def described(self, block: str) -> Mapping[str, Any]:
        """The experiment's ``model`` or ``dataset``, from the first receipt that has it."""
        found = (one.receipt["config"].get(block) for one in sorted(self.jobs.values(), key=lambda one: one.ended))
        return next((value for value in found if value), {})


def read(results: Path, *, leave_out: Iterable[str] = ()) -> Sources:
    """Read an experiment's folder of results.

    Raises:
        DataError: no job has finished, or a file is of another version.
        CorruptError: a file is not the one that its receipt names.
    """
    found = published(results, leave_out=leave_out)
    if not found:
        raise DataError(f"{results}: no job has finished there, so there is nothing to report; tribunal run calibrate makes a start")
    jobs = {}
    for job, receipt in found.items():
        one = Finished(job, results / job, receipt, receipts.stale(job, found.get))
        jobs[job] = replace(one, report=read_report(one.file(REPORT))) if REPORT in receipt["outputs"] else one
    return Sources(results.name, jobs, _part(jobs, "label_traces", AUDIT, Audit), _part(jobs, "generate_traces", SUMMARY, Summary))


def published(results: Path, *, leave_out: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
    """Receipt of every finished job."""
    folders = sorted(path.parent for path in results.glob(f"*/{receipts.RECEIPT}"))
    found = {folder.name: receipts.read_receipt(folder) for folder in folders if not folder.name.startswith(".")}
    return {job: receipt for job, receipt in found.items() if receipt is not None and job not in set(leave_out)}


def _part(jobs: Mapping[str, Finished], job: str, name: str, kind: type[Part]) -> Part | None:
    if job not in jobs or name not in jobs[job].receipt["outputs"]:
        return None
    path = jobs[job].file(name)
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}; is it of another version?") from None
