"""The generations of a job: who ran it when, how it ended and how many units it made durable."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from tribunal.core.storage import make_folder, storage_errors


class Ledger:
    """An append-only file of ``start`` and ``end`` lines shared by the shards of a job.

    Lines are short and written with one O_APPEND write each. A torn line is skipped by readers; a start without an end is a
    generation that was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, shard: str, epoch: int) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        self._append({"event": "start", "shard": shard, "epoch": epoch, "host": socket.gethostname(), "pid": os.getpid(), "job": job})

    def end(self, shard: str, epoch: int, *, cause: str, seconds: float, units: int) -> None:
        self._append({"event": "end", "shard": shard, "epoch": epoch, "cause": cause, "seconds": round(seconds, 3), "units": units})

    def generations(self) -> list[dict[str, Any]]:
        """One row per start, in order: host, pid, job, started, and cause, seconds, units where it ended by itself."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for event in self._events():
            key = (event["shard"], event["epoch"])
            if event["event"] == "start":
                started = {name: event[name] for name in ("shard", "epoch", "host", "pid", "job")}
                rows[key] = {**started, "started": event["time"], "cause": "killed", "seconds": None, "units": None}
            elif key in rows:
                rows[key].update({name: event[name] for name in ("cause", "seconds", "units")})
        return list(rows.values())

    def _append(self, event: dict[str, Any]) -> None:
        make_folder(self.path.parent)
        line = json.dumps({**event, "time": round(time.time(), 3)}) + "\n"
        with storage_errors(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)

    def _events(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # torn: the writer was killed within its one write
        return events
