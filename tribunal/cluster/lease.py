"""One writer per piece of work, with an epoch that only grows.

A lease is a folder of ``epoch-000007.json`` files; whoever creates the next number with an exclusive link holds it.
Everything a generation writes carries its epoch, so a late writer of an earlier epoch (an orphan, a copy on a dead
node) can harm nothing even while it still runs; the lease only keeps two copies from doing the same work twice.

Takeover: a released lease, or one whose holder is a dead process of this host, or an earlier start of the same SLURM
job, at once; any other after its heartbeat has stood still for ``takeover_wait_s``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tribunal.cluster import slurm
from tribunal.core.errors import CorruptError, StorageError, UserError
from tribunal.core.storage import fsync_folder, make_folder, read_json, storage_errors, write_json

log = logging.getLogger(__name__)
BEAT_S = 10.0
TAKEOVER_WAIT_S = 60.0
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LeaseHeld(UserError):
    """Another live process works on the same piece."""


class Lease:
    """Hold with ``with Lease(folder, what) as lease:``; ``lease.epoch`` is then ours.

    Args:
        folder: the lease's folder.
        what: names the work in messages.
        takeover_wait_s: how long a foreign host's heartbeat must stand still before its lease is taken.
        beat_s: seconds between heartbeats.
        facts: small JSON written with every heartbeat (progress), for ``tribunal status``.
        on_lost: called from a side thread when another process has taken the lease over.

    ``took_over`` is True where the last holder had not given the lease back, hence may still be writing.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        takeover_wait_s: float = TAKEOVER_WAIT_S,
        beat_s: float = BEAT_S,
        facts: Callable[[], dict[str, Any]] | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.what = what
        self.takeover_wait_s = takeover_wait_s
        self.beat_s = beat_s
        self.facts = facts or dict
        self.epoch = 0
        self.took_over = False
        self.on_lost = on_lost
        self._beats = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            LeaseHeld: a live process holds it; names host and pid.
        """
        while True:
            make_folder(self.folder)
            newest = _newest(self.folder)
            if newest is not None:
                self._wait_for(newest)
                holder = _read(newest)
                self.took_over = holder is None or not holder["released"]
            self.epoch = (_number(newest) if newest else 0) + 1
            try:
                if self._claim():
                    break
            except StorageError:
                if self.folder.exists():  # else it was retired meanwhile
                    raise
        for path in self.folder.glob("epoch-*.json"):
            if _number(path) < self.epoch:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):
            _remove_if_dead(path)
        if self.beat_s > 0:
            self._thread = threading.Thread(target=self._beat, name=f"lease {self.what}", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Give the lease back; the epoch stays taken for ever."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if self.path.exists():  # gone when the results were published and the state removed
                write_json(self.path, {**self._holder(), "released": True})

    def retire(self) -> None:
        """Give the lease back and remove it: what it guarded is finished, and says so elsewhere. Its epochs start anew."""
        self.release()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody waits in it: no harm
            self.folder.rmdir()

    def held(self) -> bool:
        """Whether the lease is still ours."""
        return not self._released.is_set() and self.path.exists() and _newest(self.folder) == self.path

    @property
    def path(self) -> Path:
        return self.folder / f"epoch-{self.epoch:06d}.json"

    def _claim(self) -> bool:
        temporary = self.folder / f".claim-{self.epoch}-{os.getpid()}.tmp"
        write_json(temporary, self._holder())
        with storage_errors(self.path):
            try:
                try:
                    os.link(temporary, self.path)
                except OSError as error:
                    if error.errno not in NO_HARD_LINKS:
                        raise
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                    write_json(self.path, self._holder())
                fsync_folder(self.folder)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def _holder(self) -> dict[str, Any]:
        return {**identity(), "beat": self._beats, "released": False, "facts": self.facts()}

    def _beat(self) -> None:
        while not self._released.wait(self.beat_s):
            self._beats += 1
            # a full disk must not end the work from a side thread: the work itself meets the error when it saves
            with self._lock, contextlib.suppress(StorageError):
                if self.path.exists():
                    write_json(self.path, self._holder())
                    continue
            self.on_lost()
            return

    def _wait_for(self, newest: Path) -> None:
        holder = _read(newest)
        if holder is None or holder["released"] or not _may_live(holder):
            return
        me = identity()
        if holder["host"] == me["host"]:
            raise LeaseHeld(
                f"{self.what} is being worked on by process {holder['pid']} on this host ({holder['host']}); "
                "wait for it, or stop it first (it saves and ends on SIGTERM)"
            )
        if holder["job"] is not None and holder["job"] != me["job"] and _ended(holder["job"]):
            return
        deadline = time.monotonic() + self.takeover_wait_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.takeover_wait_s))
            now = _read(newest)
            if now is None or now["released"]:
                return
            if now["beat"] != holder["beat"]:
                raise LeaseHeld(
                    f"{self.what} is being worked on by process {holder['pid']} on {holder['host']}"
                    + (f" (SLURM job {holder['job']})" if holder["job"] else "")
                    + "; its heartbeat is alive"
                )


def identity() -> dict[str, Any]:
    """Who this process is: enough to tell later whether it still lives."""
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _may_live(holder: dict[str, Any]) -> bool:
    """False when the holder is certainly gone (or superseded by us)."""
    me = identity()
    if holder["job"] is not None and holder["job"] == me["job"] and holder["restarts"] < me["restarts"]:
        return False
    if holder["host"] != me["host"]:
        return True
    if holder["boot"] != me["boot"]:
        return False
    if holder["pid"] == me["pid"] and holder["started"] == me["started"]:
        return False  # left behind by this very process (in-process runs)
    started = _process_start(holder["pid"])
    return started is not None and started == holder["started"]


def _ended(job: str) -> bool:
    """Whether the controller says that a SLURM job is over; False also where it says nothing."""
    try:
        state = slurm.ask(job, timeout_s=10).state
    except slurm.SlurmError as error:
        log.info("lease: SLURM job %s: %s", job, error)
        return False
    return state not in {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"}


def release_dead(folder: Path, pid: int) -> None:
    """Give back the lease of a process of this host that has ended without doing so."""
    newest = _newest(folder)
    holder = _read(newest) if newest is not None else None
    if newest is None or holder is None or holder["released"] or holder["host"] != socket.gethostname() or holder["pid"] != pid:
        return
    assert not _may_live(holder), f"process {pid} is alive"
    write_json(newest, {**holder, "released": True})


def nobody_works(leases: Path) -> bool:
    """Whether each lease of a job (a folder each) was given back, or its holder is certainly gone."""
    newest = [path for folder in leases.glob("*") if (path := _newest(folder)) is not None]
    holders = [_read(path) for path in newest]
    return all(holder is not None and (holder["released"] or not _may_live(holder)) for holder in holders)


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("epoch-*.json"), key=_number, default=None)


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (StorageError, CorruptError):
        return None  # released and removed, or damaged: nobody can prove to hold it
    return value if isinstance(value, dict) and {"host", "pid", "released", "beat"} <= value.keys() else None


def _remove_if_dead(path: Path) -> None:
    pid = path.name.removesuffix(".tmp").rpartition("-")[2].rpartition(".")[2]
    if pid.isdigit() and int(pid) != os.getpid() and _process_start(int(pid)) is None:
        path.unlink(missing_ok=True)
