"""Interrupts a drill's job once, at a chosen phase, from inside; never imported outside a drill.

``run_job.py`` of a snapshot calls ``arm`` where ``TRIBUNAL_DRILL`` is set. What is interrupted stays as it is: the points are put
around it here.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tribunal.cluster import checkpoint, launch, resubmission
from tribunal.cluster.job import Job, Shard
from tribunal.cluster.slurm import call, this_start
from tribunal.core import storage
from tribunal.core.config import Experiment

PHASES = ("import", "before the first unit", "within a unit", "during a save", "between save and requeue")
ACTIONS = ("USR1", "TERM", "KILL", "requeue")
_top = os.getpid()
_armed: dict[str, str] = {}


def arm(text: str) -> None:
    """Prepare this process, and the one it will fork, for the interruption that ``text`` describes."""
    _armed.update(json.loads(text))
    make = launch.make_job

    def make_armed(name: str, experiment: Experiment, shard: Shard | None = None) -> Job[Any]:
        job = make(name, experiment, shard)
        job.build = _around(job.build)  # type: ignore[method-assign]
        return job

    launch.make_job = make_armed
    if _armed["phase"] == "during a save":
        _spoil_saves()
    if _armed["phase"] == "between save and requeue":
        go_on = resubmission.Continuation.go_on

        def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
            fire()
            return go_on(self, *arguments, **options)

        resubmission.Continuation.go_on = interrupted  # type: ignore[method-assign]


def fire() -> None:
    """Do it, once in the drill's life."""
    try:
        os.close(os.open(Path(_armed["marker"]), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    action = _armed["action"]
    print(f"drill: {action} {_armed['phase']}", flush=True)
    if action == "requeue":
        start = this_start()
        assert start is not None, "a requeue needs SLURM"
        call(["scontrol", "requeue", start.task])
    elif action == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        for pid in {_top, os.getpid()}:  # SLURM signals every process of the step
            os.kill(pid, signal.Signals[f"SIG{action}"])
    time.sleep(0.05)


def _around(build: Callable[[], Any]) -> Callable[[], Any]:
    def armed() -> Any:
        phase = _armed["phase"]
        if phase == "import":
            sys.meta_path.insert(0, _Importing())
        work = build()
        if phase in ("import", "before the first unit"):
            fire()  # the former where nothing heavy was left to import
        if phase in ("within a unit", "between save and requeue"):
            threading.Thread(target=_after_a_unit, args=(work,), daemon=True).start()
        return work

    return armed


def _after_a_unit(work: Any) -> None:
    """Wait for one unit more than there was; for the last phase the job is first told to stop."""
    before = work.progress().done
    while work.progress().done == before:
        time.sleep(0.002)
    if _armed["phase"] == "within a unit":
        fire()
    elif not Path(_armed["marker"]).exists():
        os.kill(_top, signal.SIGUSR1)


class _Importing(importlib.abc.MetaPathFinder):
    """Fires when torch begins to be imported; finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch":
            fire()


def _spoil_saves() -> None:
    """Fire when half of a journal's line is written, or when a checkpoint's file is there but not yet durable."""
    write, fsync = storage._write_all, checkpoint.fsync_file
    calls = {"journal": 0}

    def write_half(handle: int, data: bytes) -> None:
        calls["journal"] += 1
        if calls["journal"] < 2:
            write(handle, data)
            return
        write(handle, data[: len(data) // 2])
        fire()
        write(handle, data[len(data) // 2 :])

    def fsync_after(path: Path) -> None:
        fire()
        fsync(path)

    storage._write_all = write_half
    checkpoint.fsync_file = fsync_after
