"""What the login node asks SLURM, as seldom as it can: one squeue call in 30 s however many jobs, tasks and terminals."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tribunal.cluster.slurm import SlurmError, call
from tribunal.core.storage import write_json

CACHE_S = 30.0
FIELDS = ("array", "index", "id", "state", "reason", "start", "name", "script", "dependency")
FORMAT = "%F|%K|%A|%T|%r|%S|%j|%o|%E"
DEFAULT_ARRAY = 1001


@dataclass(frozen=True)
class Entry:
    """One line of squeue; an array's waiting tasks share one line.

    Attributes:
        array: the array's id, or the job's.
        index: array indices such as ``3`` or ``4-9``; None for a single job.
        start: expected or real start, as squeue prints it.
    """

    array: str
    index: str | None
    id: str
    state: str
    reason: str
    start: str
    name: str
    script: str
    dependency: str

    def indices(self) -> list[int] | None:
        """The array tasks that this line speaks of; None for a single job."""
        if self.index is None:
            return None
        found: list[int] = []
        for part in self.index.strip("[]").partition("%")[0].split(","):
            first, _, last = part.partition("-")
            last, _, step = last.partition(":")
            found += range(int(first), int(last or first) + 1, int(step or 1))
        return found

    @property
    def own_id(self) -> str:
        """The id to use in commands."""
        return self.array if self.index is None else f"{self.array}_{self.index}"


@dataclass(frozen=True)
class Snapshot:
    """The user's jobs as SLURM last told them.

    Attributes:
        age_s: how old the answer is.
        error: why there is no newer one; None when squeue answered.
    """

    entries: tuple[Entry, ...]
    age_s: float
    error: str | None

    def named(self, name: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.name == name]


def read(*, fresh: bool = False) -> Snapshot:
    """The user's queue, from the cache file where it is younger than 30 s (``fresh`` asks anyway: before submitting).

    Never raises for a controller that is away: the snapshot then says so and holds what was known last.
    """
    path = _cache_path()
    with _locked(path):
        known = _load(path)
        if known is not None and not fresh and time.time() - known["asked"] < CACHE_S:
            return _snapshot(known)
        lines, error = (known or {}).get("lines", []), None
        told = (known or {}).get("told", 0.0)
        try:
            # -a: partitions hidden from the user too; array tasks that wait stay on one line
            lines = call(["squeue", "-h", "-a", "-u", getpass.getuser(), "-o", FORMAT]).splitlines()
            told = time.time()
        except SlurmError as problem:
            error = str(problem)
        known = {"asked": time.time(), "told": told, "lines": lines, "error": error}
        write_json(path, known)
        return _snapshot(known)


def partitions() -> dict[str, str]:
    """Partitions and their time limits; empty where sinfo cannot say."""
    try:
        lines = call(["sinfo", "-h", "-a", "-o", "%R|%l"]).splitlines()
    except SlurmError:
        return {}  # sbatch itself will tell
    return dict(line.split("|")[:2] for line in lines if "|" in line)


def gpus() -> list[str]:
    """Generic resources of the nodes, as sinfo names them (gpu:a100:4)."""
    try:
        lines = call(["sinfo", "-h", "-a", "-o", "%G"]).splitlines()
    except SlurmError:
        return []
    return sorted({line.strip() for line in lines} - {"(null)", ""})


def max_array_size() -> int:
    """Largest array index plus one."""
    try:
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.MULTILINE)
    except SlurmError:
        return DEFAULT_ARRAY  # a dry run on a laptop
    return int(match[1]) if match else DEFAULT_ARRAY


def test_only(script: Path, options: Sequence[str] = ()) -> str | None:
    """Why sbatch would refuse a script; None when it would take it."""
    try:
        call(["sbatch", "--test-only", *options, str(script)])
    except SlurmError as error:
        return reason(str(error))
    return None


def reason(text: str) -> str:
    """The part of an sbatch error that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "llocation failure" in line or "atch job submission failed" in line]
    return re.sub(r"^(sbatch: )?(error: )?", "", (telling or lines or ["no reason given"])[-1])


def find_script(name: str, script: Path, *, known: Sequence[str] = (), attempts: int = 3) -> str | None:
    """The id of a queued job of this name and script that is not ``known``: whether a submission that seemed to fail was accepted.

    Raises:
        SlurmError: the controller does not say, so a second submission could be a second copy.
    """
    for attempt in range(attempts):
        try:
            lines = call(["squeue", "-h", "-a", "-n", name, "-o", "%F|%o"]).splitlines()
        except SlurmError:
            if attempt == attempts - 1:
                raise
            time.sleep(2.0)
            continue
        found = {line.partition("|")[0] for line in lines if line.partition("|")[2].split(" ")[0] == str(script)} - {*known}
        return max(found, key=int) if found else None
    return None


def cancel(ids: Sequence[str]) -> None:
    """scancel: running jobs hear SIGTERM, save and stay stopped."""
    if ids:
        call(["scancel", *ids])


def _cache_path() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tribunal"
    base.mkdir(parents=True, exist_ok=True)
    cluster = re.sub(r"\W+", "-", os.environ.get("SLURM_CONF", "default")).strip("-")
    return base / f"squeue-{cluster}.json"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two terminals that look at once make one call; where locks do not work they make two."""
    with path.with_suffix(".lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and {"asked", "told", "lines", "error"} <= value.keys() else None


def _snapshot(known: dict[str, Any]) -> Snapshot:
    entries = []
    for line in known["lines"]:
        parts = line.split("|")
        if len(parts) >= len(FIELDS):
            values = dict(zip(FIELDS, parts))
            values["index"] = None if values["index"] in ("N/A", "") else values["index"]
            entries.append(Entry(**values))
    return Snapshot(tuple(entries), time.time() - known["told"], known["error"])
