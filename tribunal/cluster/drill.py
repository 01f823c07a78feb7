"""A shrunk copy of the user's experiment, interrupted on their own cluster at every phase in every way.

One undisturbed run first; then one copy per phase and kind of interruption, each in a root of its own, each submitted as the
user would submit it. A copy that stays stopped (SIGTERM means what scancel means; a killed supervisor can ask nobody) is
resumed as the user would. All have to end with the undisturbed run's digest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tribunal.cluster import control, live, queue, submission
from tribunal.cluster.drill_points import ACTIONS, PHASES
from tribunal.cluster.job import root
from tribunal.cluster.launch import make_job
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.pipelines import jobs_of
from tribunal.cluster.plan import make_plan
from tribunal.core import receipts
from tribunal.core.config import Experiment
from tribunal.core.errors import UserError
from tribunal.core.storage import make_folder

ONLY_SLURM = {"between save and requeue", "requeue"}
AT_ONCE = {"slurm": 20, "local": 2}
POLL_S = 3.0
QUIET_S = 12.0
"""A copy that is neither queued nor finished for so long has stopped for good."""
MAX_RESUMES = 3


@dataclass
class Case:
    """One copy: where it lies, what happens to it, how it ended."""

    job: str
    phase: str
    action: str
    root: Path
    cluster: str
    resumes: int = 0
    failure: str | None = None
    receipt: dict[str, Any] | None = None
    quiet_since: float | None = None
    jobs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.job}, {self.action} {self.phase}"

    @property
    def over(self) -> bool:
        return self.receipt is not None or self.failure is not None


@dataclass(frozen=True)
class Result:
    """One line of the drill's table."""

    case: str
    survived: bool
    said: str
    redone_units: int
    lost_s: float


def shrink(names: Sequence[str]) -> list[str]:
    """Overrides that make a copy short and undivided; nothing of what it computes changes by them."""
    slurm = {"time": "'0:15:00'", "signal_lead_s": 60, "array": 1}
    changes = [f"slurm.{key}={value}" for key, value in slurm.items()]
    return changes + [f"slurm.jobs.{name}.{key}={value}" for name in names for key, value in (("time", "'0:15:00'"), ("array", 1))]


def run(experiment: Experiment, names: Sequence[str], cluster: str, say: Callable[[str], None]) -> list[Result]:
    """Drill these jobs; returns one result per interruption.

    Raises:
        UserError: the undisturbed run itself did not finish.
    """
    base = root() / "drills" / experiment.name
    shutil.rmtree(base, ignore_errors=True)
    chain = _with_needs(experiment, names)
    reference = Case(names[-1], "", "undisturbed", base / "undisturbed", cluster, jobs=chain)
    _submit(experiment, reference)
    say(f"undisturbed run of {', '.join(chain)}: {_wait(experiment, [reference], say)}")
    if reference.failure:
        raise UserError(f"drill: the undisturbed run of {reference.job} did not finish: {reference.failure}; it lies in {reference.root}")
    cases = [
        Case(job, phase, action, base / f"{job}-{PHASES.index(phase)}-{action}", cluster, jobs=[job])
        for job in names
        for phase in PHASES
        for action in ACTIONS
        if cluster == "slurm" or not {phase, action} & ONLY_SLURM
    ]
    say(f"{len(cases)} interrupted copies")
    for first in range(0, len(cases), AT_ONCE[cluster]):
        some = cases[first : first + AT_ONCE[cluster]]
        for case in some:
            _lend(experiment, reference, case)
            _submit(experiment, case)
        _wait(experiment, some, say)
    results = [_result(experiment, reference, case) for case in cases]
    if all(result.survived for result in results):
        shutil.rmtree(base, ignore_errors=True)
        with contextlib.suppress(OSError):
            base.parent.rmdir()
    return results


def table(results: Sequence[Result]) -> str:
    """Every interruption, then how many were survived and what was lost at most."""
    width = max(len(result.case) for result in results)
    lines = [f"{'ok' if result.survived else 'LOST':<5} {result.case:<{width}}  {result.said}" for result in results]
    good = sum(result.survived for result in results)
    units, seconds = max(result.redone_units for result in results), max(result.lost_s for result in results)
    lines.append(
        f"survived {good} of {len(results)}, each with the undisturbed run's digest"
        if good == len(results)
        else f"survived {good} of {len(results)}"
    )
    lines.append(f"largest loss: {units} finished units done again, {seconds:.1f} s of work (restarts not counted)")
    return "\n".join(lines)


def _with_needs(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """The jobs and everything that they read, parents first."""
    found: list[str] = []

    def add(name: str) -> None:
        for needed in make_job(name, experiment).needs:
            add(needed)
        if name not in found:
            found.append(name)

    for name in names:
        add(name)
    return found


@contextlib.contextmanager
def _at(case: Case) -> Iterator[None]:
    """Work under a case's own root, with its interruption in the environment of what is submitted."""
    before = {key: os.environ.get(key) for key in ("TRIBUNAL_ROOT", "TRIBUNAL_DRILL")}
    make_folder(case.root)
    os.environ["TRIBUNAL_ROOT"] = str(case.root)
    if case.phase:
        marker = str((case.root / "fired").resolve())
        os.environ["TRIBUNAL_DRILL"] = json.dumps({"phase": case.phase, "action": case.action, "marker": marker})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _submit(experiment: Experiment, case: Case) -> None:
    with _at(case):
        plan = make_plan(experiment, case.jobs, {})
        if case.cluster == "slurm":
            submission.submit_slurm(plan)
        else:
            submission.submit_local(plan)


def _lend(experiment: Experiment, reference: Case, case: Case) -> None:
    """Give a copy the undisturbed run's inputs."""
    for needed in make_job(case.job, experiment).needs:
        source = reference.root / "results" / experiment.name / needed
        shutil.copytree(source, case.root / "results" / experiment.name / needed, dirs_exist_ok=True)


def _wait(experiment: Experiment, cases: Sequence[Case], say: Callable[[str], None]) -> str:
    """Until all have finished or given up; what stays stopped is resumed. Returns a summary."""
    told = time.monotonic()
    while not all(case.over for case in cases):
        time.sleep(POLL_S)
        seen = queue.read(fresh=True)
        for case in cases:
            if not case.over:
                _look(experiment, case, seen)
        if time.monotonic() - told > 30:
            say(f"{sum(case.over for case in cases)} of {len(cases)} ended")
            told = time.monotonic()
    return ", ".join(case.failure or "finished" for case in cases)


def _look(experiment: Experiment, case: Case, seen: queue.Snapshot) -> None:
    with _at(case):
        folder = root() / "results" / experiment.name / case.job
        live_tasks = live.tasks(experiment.name, seen)
        if live_tasks or (seen.error is not None and case.cluster == "slurm"):
            case.quiet_since = None
            return
        if (receipt := receipts.read_receipt(folder)) is not None:
            case.receipt = receipt
            return
        case.quiet_since = case.quiet_since or time.monotonic()
        if time.monotonic() - case.quiet_since < QUIET_S:
            return
        rows = Ledger(root() / "checkpoints" / experiment.name / case.job / "generations.jsonl").generations()
        why = (rows[-1]["why"] or rows[-1]["error"] or rows[-1]["cause"]) if rows else "never started"
        if not case.phase or case.resumes >= MAX_RESUMES:
            case.failure = why
            return
        case.resumes += 1
        case.quiet_since = None
        control.resume(experiment.name, None)


def _result(experiment: Experiment, reference: Case, case: Case) -> Result:
    if case.receipt is None:
        return Result(case.name, False, f"did not finish: {case.failure}; it lies in {case.root}", 0, 0.0)
    whole = receipts.read_receipt(reference.root / "results" / experiment.name / case.job)
    assert whole is not None
    same = case.receipt["digest"] == whole["digest"]
    redone = case.receipt["totals"]["units"] - whole["totals"]["units"]
    lost = case.receipt["totals"]["seconds"] - whole["totals"]["seconds"]
    fired = (case.root / "fired").exists()
    said = f"{len(case.receipt['generations'])} generations"
    said += ", went on by itself" if not case.resumes else f", stayed stopped until tribunal resume ({case.resumes}x)"
    said += "" if same else "; ANOTHER DIGEST"
    said += "" if fired else "; the interruption never came: the phase was not met"
    return Result(case.name, same and fired, said + ("" if same and fired else f"; it lies in {case.root}"), redone, max(0.0, lost))


def chosen(words: Sequence[str]) -> list[str]:
    """The jobs to drill: those named, by default the calibration's first.

    Raises:
        ConfigError: no such job.
    """
    names = [job for word in words for job in jobs_of(word)] or [jobs_of("calibrate")[0]]
    return list(dict.fromkeys(names))
