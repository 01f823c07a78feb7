"""The generations of a job: who ran it when, how it ended, how many units it made durable, and what was decided then."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.core.storage import storage_errors

Row = dict[str, Any]
_START = ("shard", "epoch", "host", "pid", "job", "restarts", "gpus", "launched")
_TIMES = ("working", "ended", "left")
_LATER = (
    "cause",
    "seconds",
    "units",
    "error",
    "mendable",
    "in_flight",
    "progressed",
    "saving",
    "done",
    "total",
    "unit",
    "asked",
    "next",
    "why",
    "continuation",
)


class Ledger:
    """An append-only file of events shared by the shards of a job.

    Events of a generation: ``start``; ``work`` (loaded: units done so far, in all); ``asked`` (told to stop); ``end``;
    ``decided`` (whether, why and how it goes on). Lines are short and written with one O_APPEND write each. A torn line
    is skipped by readers; a start without an end is a generation that was killed. The folder is not made here: a late
    writer must not bring back the state of a job that was published meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, shard: str, epoch: int, *, launched: float | None = None) -> None:
        """``launched``: when the process was started; importing and taking the lease lie between that and now."""
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        who = {"host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid(), "job": job}
        facts = {"restarts": restarts, "gpus": gpus(shard), "launched": launched}
        self._append({"event": "start", "shard": shard, "epoch": epoch, **who, **facts})

    def work(self, shard: str, epoch: int, *, done: int, total: int | None, unit: str) -> None:
        self._append({"event": "work", "shard": shard, "epoch": epoch, "done": done, "total": total, "unit": unit})

    def asked(self, shard: str, epoch: int, cause: str) -> None:
        self._append({"event": "asked", "shard": shard, "epoch": epoch, "asked": cause})

    def end(self, shard: str, epoch: int, *, cause: str, seconds: float, units: int | None, **facts: Any) -> None:
        """``facts``: error (one line), mendable (the user has to act), in_flight (keys of the units being worked on)."""
        self._append(
            {"event": "end", "shard": shard, "epoch": epoch, "cause": cause, "seconds": round(seconds, 3), "units": units, **facts}
        )

    def decided(self, shard: str, epoch: int, **facts: Any) -> None:
        """``next`` (``requeue``, ``sbatch``, ``by hand`` or ``nothing``), why, cause (as the controller has it), continuation (an id)."""
        self._append({"event": "decided", "shard": shard, "epoch": epoch, **facts})

    def note(self, event: str) -> None:
        """What the user did to the whole job: ``resumed`` (budgets count from here on) or ``cancelled`` (nothing follows)."""
        self._append({"event": event, "shard": "*", "epoch": 0})

    def generations(self, shard: str | None = None) -> list[Row]:
        """One row per start, in order; of one shard, or of all. What is not known (yet) is None; ``cause`` is then "killed".

        ``before_resume``: the user has submitted the job again since, so this start counts against no budget any more.
        """
        lines = self._lines()
        if shard is not None:  # of 10,000 shards' events a start parses its own
            lines = [line for line in lines if f'"shard": "{shard}"' in line or '"shard": "*"' in line]
        return self._rows(lines)

    def with_units_in_flight(self) -> list[Row]:
        """The generations of every shard that ever ended while it worked on units: what ``budget.units_set_aside`` looks at."""
        lines = self._lines()
        shards = {event["shard"] for event in _parsed(line for line in lines if '"in_flight": ["' in line)}
        return [row for shard in sorted(shards) for row in self.generations(shard)]

    def _rows(self, lines: Iterable[str]) -> list[Row]:
        rows: dict[tuple[str, int], Row] = {}
        for event in _parsed(lines):
            key = (event["shard"], event["epoch"])
            if event["event"] == "resumed":
                for row in rows.values():
                    row["before_resume"] = True
            elif event["event"] == "start":
                blank: Row = {**dict.fromkeys((*_TIMES, *_LATER)), "cause": "killed", "in_flight": [], "before_resume": False}
                rows[key] = {**{name: event.get(name) for name in _START}, "started": event["time"], **blank}
            elif key in rows:
                if event["event"] == "work":
                    rows[key]["working"] = event["time"]
                settled = ("cause", "error") if rows[key]["next"] is not None and event["event"] != "decided" else ()
                rows[key].update({name: event[name] for name in _LATER if name in event and name not in settled})
                if event["event"] == "end":
                    rows[key]["ended"] = event["time"]
                elif event["event"] == "decided":
                    rows[key]["left"] = event["time"]  # its process ends within moments
        _count_killed(list(rows.values()))
        return list(rows.values())

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({**event, "time": round(time.time(), 3)}) + "\n"
        with storage_errors(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, line.encode())
                os.fsync(handle)
            finally:
                os.close(handle)

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


def _parsed(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # torn: the writer was killed within its one write


def gpus(shard: str, env: Mapping[str, str] = os.environ) -> int:
    """GPUs that this start of a shard holds: of an allocation that several shards work in, its part."""
    if env.get("SLURM_GPUS_ON_NODE", "").isdigit():
        held = int(env["SLURM_GPUS_ON_NODE"]) * int(env.get("SLURM_JOB_NUM_NODES", "1"))
        sharers = 1 if shard.endswith("-of-1") else int(env.get("SLURM_STEP_NUM_TASKS", "1"))
        return held // sharers
    return len([device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip() not in ("", "-1", "NoDevFiles")])


def _count_killed(rows: Sequence[Row]) -> None:
    """A generation that was killed made durable what the next one of its shard to get to work found beyond its own start."""
    found: dict[str, int] = {}
    for row in reversed(rows):
        if row["units"] is None and row["done"] is None and row["shard"] in found:
            row["units"] = 0  # it never got to work
        elif row["units"] is None and row["shard"] in found:
            row["units"] = max(0, found[row["shard"]] - row["done"])
        if row["done"] is not None:
            found[row["shard"]] = row["done"]
