"""A power cut in a test: what the journals keep is what an fsync has seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.resume import StopAfter
from tribunal.cluster.ledger import Ledger


class PowerCut(BaseException):
    """The machine stops: nothing that runs after this reaches the disk."""


class Disk:
    """Remembers each journal file as it was at its last fsync, until ``on`` is False."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.durable: dict[Path, int] = {}
        self.on = True
        fsync, end = os.fsync, Ledger.end

        def noted(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if self.on and path.parent.name == "journal":
                self.durable[path] = os.fstat(handle).st_size
            fsync(handle)

        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(Ledger, "end", lambda *args, **facts: end(*args, **facts) if self.on else None)

    def not_durable(self, journal: Path) -> int:
        """Bytes that no fsync has seen."""
        return sum(path.stat().st_size - self.durable.get(path, 0) for path in journal.glob("*.jsonl"))

    def cut(self, journal: Path) -> None:
        """Lose them."""
        for path in journal.glob("*.jsonl"):
            os.truncate(path, self.durable.get(path, 0))


class CutAfter(StopAfter):
    """Saves at every tenth look, and has the power cut at the last one."""

    def __init__(self, looks: int, disk: Disk) -> None:
        super().__init__(None)
        self.last, self.disk = looks, disk
        disk.on = True

    def is_set(self) -> bool:
        if self.looks >= self.last:
            self.disk.on = False
            raise PowerCut
        return super().is_set()

    def save_due(self) -> bool:
        return self.looks % 10 == 0
