"""Job: one named stage of an experiment, from its section of the experiment file to its folder under results/.

A subclass (one per module of ``jobs/``) says what it needs, builds the ``Work`` and publishes its artefacts. It holds no
loop, no signal and no science. How it is run, stopped and resumed is ``tribunal.cluster.launch``'s part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.cluster.fence import Fences
from tribunal.core import receipts
from tribunal.core.config import Experiment, Section, SlurmJob
from tribunal.core.storage import Journal, sha256_json, storage_errors
from tribunal.core.work import Json, Work

ConfigT = TypeVar("ConfigT", bound=Section)
ItemT = TypeVar("ItemT")
MAX_IN_FLIGHT = 1000
"""Units named where a process is found dead; a larger item is named by its first ones."""


@dataclass(frozen=True)
class Shard:
    """Which part of a job's plan this process works on: item ``i`` belongs to shard ``i % count``."""

    index: int = 0
    count: int = 1

    def mine(self, plan: Sequence[ItemT]) -> list[ItemT]:
        return list(plan[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


def root() -> Path:
    """Where checkpoints/ and results/ lie: ``TRIBUNAL_ROOT``, by default the current folder."""
    return Path(os.environ.get("TRIBUNAL_ROOT") or Path.cwd())


class Metrics:
    """One row of numbers per step, exactly once however often the step was replayed; published as ``metrics.jsonl``."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def row(self, *, step: int, **numbers: float) -> None:
        # durable before the checkpoint that it leads to: rows after the last one are replayed
        self.journal.append({f"{step:09d}": {"step": step, **numbers}})

    def rows(self, up_to: int | None = None) -> list[Json]:
        """Rows in order of their steps, those after ``up_to`` left out."""
        rows = [self.journal[key] for key in sorted(self.journal)]
        return [row for row in rows if up_to is None or row["step"] <= up_to]


class Job(Generic[ConfigT]):
    """Base class of the jobs.

    Class attributes:
        name: the module's name; names the section, the results folder and the sbatch script.
        needs: jobs whose results it reads.
        uses: blocks of the experiment that its result depends on, besides its own section and its inputs.
        resources: what it asks of SLURM when the experiment says nothing.
        shards: whether its plan may be split over array tasks.
        distributed: whether several processes may do its work together, one for each GPU (torch.distributed).
        only_if_read: a pipeline leaves it out where no other of its jobs reads its results.
        reads_all: it reads whatever has finished (its section has a field ``after``): it comes last, and is made anew, not
            refused, when that changed.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ("model", "dataset", "seed")
    resources: ClassVar[SlurmJob] = SlurmJob(time="4:00:00", nodes=1, gpus=1, cpus=8, mem_gb=64)
    shards: ClassVar[bool] = False
    distributed: ClassVar[bool] = False
    only_if_read: ClassVar[bool] = False
    reads_all: ClassVar[bool] = False

    def __init__(self, experiment: Experiment, shard: Shard | None = None) -> None:
        self.experiment = experiment
        self.config = cast(ConfigT, experiment.sections[self.name])
        self.shard = shard or Shard()
        self.epoch = 0
        self.launched: float | None = None  # when SLURM started this process, by the clock
        self.set_aside: frozenset[str] = frozenset()
        self.receipt_notes: Json = {}
        self._journals: dict[str, Journal] = {}

    # What a subclass says -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse bad input before any work.

        Raises:
            UserError: one line that names file, field, value and cure.
        """

    def build(self) -> Work:
        """The resumable computation; heavy imports and loading happen here."""
        raise NotImplementedError

    def publish(self, out: Path) -> None:
        """Write the finished artefacts into the empty folder ``out``, from durable state only.

        Units in ``self.set_aside`` (each ended two generations) are not in the journal and are left out.
        May be called again after a kill, so it must not consume what it reads (link or copy, never move).
        """
        raise NotImplementedError

    # What a subclass is given -----------------------------------------------------------------------------------------

    @property
    def results(self) -> Path:
        """This job's folder of finished artefacts; exists only when the job has finished."""
        return root() / "results" / self.experiment.name / self.name

    @property
    def state(self) -> Path:
        """This job's folder of unfinished state."""
        return root() / "checkpoints" / self.experiment.name / self.name

    @property
    def journal(self) -> Journal:
        """Finished units of this shard's part of the plan, whoever wrote them; after ``refresh()`` those of all shards.

        The other shards of the same number work on other parts: a start of one of 10,000 does not read their files.
        """
        return self._journal("journal")

    @property
    def metrics(self) -> Metrics:
        return Metrics(self._journal("metrics"))

    @property
    def parts(self) -> Path:
        """Folder for the big files of finished units; a journal record names them with their sha256."""
        folder = self.state / "parts"
        with storage_errors(folder, "create"):  # not its parents: a late writer must not bring back a published job's state
            folder.mkdir(exist_ok=True)
        return folder

    def checkpoints(self, name: str, keep: int = 2) -> CheckpointStore:
        """Durable state of an unfinished unit, by name; one writer each (include the shard where that matters).

        Units and rows that were recorded before a state is saved are durable before it counts.
        """
        counts = self.fences.checkpoints(f"states/{name}", str(self.shard))
        return CheckpointStore(
            self.state / "states" / name, owner=self.owner, epoch=self.epoch, keep=keep, counts=counts, settle=self._sync_journals
        )

    def results_of(self, job: str) -> Path:
        """The folder of a finished job that this one needs, checked against its receipt."""
        assert job in self.needs, f"{self.name} does not list {job} in needs"
        folder = root() / "results" / self.experiment.name / job
        receipts.require(folder, self.name)
        return folder

    # What the runner asks ---------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, str | None]:
        """Digest of each result that it reads; None for a job that has not finished."""
        return {job: self._input_digest(job) for job in self.needs}

    @property
    def after(self) -> tuple[str, ...]:
        """Jobs that it waits for under SLURM unless they are given up: it reads their results where there are any."""
        return ()

    def fingerprint(self) -> Json:
        """Everything that can change this job's result, as plain JSON: a resume under another one is refused."""
        values: dict[str, Any] = {self.name: self.config.fingerprint()}
        for block in self.uses:
            value = getattr(self.experiment, block)
            values[block] = value.fingerprint() if isinstance(value, Section) else value
        values["inputs"] = self.inputs()
        return values

    @property
    def lease_folder(self) -> Path:
        return self.state / "leases" / str(self.shard)

    @property
    def marker(self) -> Path:
        """Says that every unit of this shard is durable; holds what the shard has to say in the receipt."""
        return self.state / "finished" / f"{self.shard}.json"

    @property
    def fences(self) -> Fences:
        """What generations that were taken over had written until then: all of theirs that counts."""
        return Fences(self.state)

    @property
    def attempts(self) -> Path:
        """Names the units that this shard's process is working on."""
        return self.state / "attempts" / f"{self.shard}.json"

    def in_flight(self, epoch: int) -> list[str]:
        """The units that this shard's process was working on when it ended, from the note it left."""
        if not self.attempts.exists():
            return []
        try:
            note = json.loads(self.attempts.read_text())
        except ValueError:
            return []  # killed within its one write
        if note["writer"] != f"{self.shard}.{epoch}":
            return []
        recorded = self._journals.get("journal") or self._open("journal", None)
        return [key for key in note["keys"] if key not in recorded][:MAX_IN_FLIGHT]

    def progressed_in(self, epoch: int) -> bool:
        """Whether this shard's generation of that epoch made anything durable."""
        journal = self.state / "journal" / f"{self.shard}.{epoch}.jsonl"
        return (journal.exists() and journal.stat().st_size > 0) or any((self.state / "states").glob(f"*/{epoch:06d}-*"))

    @property
    def owner(self) -> str:
        return f"{self.experiment.name}/{self.name}/{sha256_json(self.fingerprint())[:16]}"

    def recorded(self, journals: Iterable[str] = ()) -> dict[str, int]:
        """Whole lines of each file of the open journals, and of those named: a later reader has to find as many."""
        found = {name: self._journal(name).lines for name in (*self._journals, *journals)}
        return {f"{name}/{file}": lines for name, files in found.items() for file, lines in sorted(files.items())}

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()
        self._journals.clear()

    def _sync_journals(self) -> None:
        for journal in self._journals.values():
            journal.sync()

    def _input_digest(self, job: str) -> str | None:
        receipt = receipts.read_receipt(root() / "results" / self.experiment.name / job)
        return receipt["digest"] if receipt else None

    def _journal(self, name: str) -> Journal:
        if name not in self._journals:
            self._journals[name] = self._open(name, f"{self.shard}.{self.epoch}")
        return self._journals[name]

    def _open(self, name: str, writer: str | None) -> Journal:
        def may_hold_ours(file: str) -> bool:
            index, _, count = file.partition(".")[0].partition("-of-")
            return count != str(self.shard.count) or index == str(self.shard.index)

        return Journal(
            self.state / name,
            writer,
            attempts=self.attempts if name == "journal" else None,
            set_aside=self.set_aside,
            limit=self.fences.journal(name),
            at_first=may_hold_ours,
        )
