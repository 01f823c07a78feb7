"""Where the processes of one start of a job agree: who leads, how each ended, and who alone resubmits.

Small files in ``starts/<job id>.<restart>/`` of the job's state: they need no library and work before torch is imported.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.cluster import preemption
from tribunal.cluster.slurm import Start
from tribunal.core.errors import UserError
from tribunal.core.storage import read_json, storage_errors, write_json

JOIN_WAIT_S = 600.0
LEAVE_WAIT_S = 30.0
POLL_S = 0.1


class Meeting:
    """One start's folder.

    Args:
        state: the job's state folder; nothing is written once it is gone (the results are published).
    """

    def __init__(self, state: Path, start: Start) -> None:
        self.start = start
        self.parent = state / "starts"
        self.folder = self.parent / start.name

    def open(self, epoch: int) -> None:
        """Rank 0: tell the other ranks the epoch and where to connect."""
        self._ready()
        facts = {"epoch": epoch, "address": _address(), "port": _free_port()}
        write_json(self.folder / "lead.json", facts)
        _set_rank(self.start, facts)

    def join(self) -> int:
        """A rank above 0: wait for rank 0, set what torch.distributed wants to know, return the epoch.

        Raises:
            UserError: rank 0 did not come.
        """
        deadline = time.monotonic() + JOIN_WAIT_S
        path = self.folder / "lead.json"
        while not path.exists():
            if time.monotonic() > deadline or preemption.noted():
                raise UserError(f"rank {self.start.rank} of {self.start.ranks} was left alone: rank 0 has not written {path}")
            time.sleep(POLL_S)
        facts = read_json(path)
        _set_rank(self.start, facts)
        return int(facts["epoch"])

    def leave_together(self) -> None:
        """Wait until every rank is out of its last collective call: one whose peer is gone by then would fail in it."""
        if self._ready():
            write_json(self.folder / f"out-{self.start.rank}.json", {})
            self._wait_for_all("out", time.time() + LEAVE_WAIT_S)

    def report(self, code: int, asked: Sequence[str]) -> None:
        """Say how this rank ended, and what had been asked of it."""
        if self._ready():
            write_json(self.folder / f"rank-{self.start.rank}.json", {"code": code, "asked": list(asked)})

    def asked(self) -> list[str]:
        """What the ranks that have reported were asked to do."""
        return [cause for path in sorted(self.folder.glob("rank-*.json")) for cause in read_json(path)["asked"]]

    def wait_for_all(self, until: float) -> bool:
        """Wait until every rank has reported, or until that time (seconds since the epoch)."""
        return self._wait_for_all("rank", until)

    def _wait_for_all(self, kind: str, until: float) -> bool:
        while time.time() < until and self.folder.exists():  # gone: the results are published
            if all((self.folder / f"{kind}-{rank}.json").exists() for rank in range(self.start.ranks)):
                return True
            time.sleep(POLL_S)
        return False

    def claim(self, intent: Mapping[str, Any]) -> Path | None:
        """The intent record of this start's one resubmission; None when another process has it."""
        if not self._ready():
            return None
        path = self.folder / "continuation.json"
        with storage_errors(path):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                return None
        write_json(path, dict(intent))
        return path

    def forget_earlier(self) -> None:
        """Remove the folders of this job's earlier starts."""
        for folder in self.parent.glob(f"{self.start.job}.*"):
            if int(folder.name.rpartition(".")[2]) < self.start.restarts:
                shutil.rmtree(folder, ignore_errors=True)  # what stays is never looked at again

    def _ready(self) -> bool:
        with storage_errors(self.folder, "create"):
            try:
                self.parent.mkdir(exist_ok=True)
                self.folder.mkdir(exist_ok=True)
            except FileNotFoundError:
                return False  # the state is gone: another rank has published
        return True


def _set_rank(start: Start, facts: Mapping[str, Any]) -> None:
    os.environ.update(
        RANK=str(start.rank),
        WORLD_SIZE=str(start.ranks),
        LOCAL_RANK=local_rank(os.environ),
        MASTER_ADDR=str(facts["address"]),
        MASTER_PORT=str(facts["port"]),
    )


def local_rank(env: Mapping[str, str]) -> str:
    """Number of this rank's device among those it sees: 0 where SLURM shows each task its own GPU alone (``--gpus-per-task``)."""
    sees = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return "0" if len(sees) == 1 else env.get("SLURM_LOCALID", "0")


def _address() -> str:
    """A name under which the other nodes find this one."""
    for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()):
        if name:
            try:
                socket.getaddrinfo(name, None)
            except OSError:
                continue
            return name
    return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
