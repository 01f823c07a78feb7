"""Notice that the job has to stop: SIGUSR1 (time limit), SIGTERM (preemption, scancel), Ctrl-C, or our own deadline.

Handlers only note the signal; the work looks at the note between steps. Nothing heavy is imported here: the
launcher installs the handlers before anything else, so that a signal during the import of torch is noted too.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

CAUSES = {signal.SIGUSR1: "time limit", signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
EARLY_S = 120
_noted: list[str] = []
_previous: dict[int, object] = {}


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(CAUSES[signal.Signals(number)])
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C ends it at once
    previous = _previous.get(number)
    if callable(previous) and previous not in (_note, signal.default_int_handler):
        previous(number, frame)


def install(*, chain: bool = True) -> None:
    """Note the signals from now on (main thread only).

    Args:
        chain: call the handlers that stood before as well; a launcher's own (submitit's save and requeue inside the
            handler) are replaced instead.
    """
    for number in CAUSES:
        current = signal.getsignal(number)
        if current is not _note:
            _previous[number] = current
            signal.signal(number, _note)
    if not chain:
        _previous.clear()


def noted() -> list[str]:
    """What has been asked of this process so far, in order."""
    return list(_noted)


def uninstall() -> None:
    """Put back what stood before ``install`` and forget what was noted (for in-process use and tests)."""
    for number in CAUSES:
        if number in _previous:
            signal.signal(number, _previous.pop(number))  # type: ignore[arg-type]
    _noted.clear()


def installed() -> bool:
    """Whether our handlers still stand (a library may have replaced them)."""
    return all(signal.getsignal(number) is _note for number in (signal.SIGUSR1, signal.SIGTERM))


class StopSignal:
    """``tribunal.core.work.Stop`` over the noted signals and a deadline.

    Args:
        deadline_s: stop at this time (seconds since the epoch); None for no deadline of our own.
        save_every_s: how often unfinished state is saved at the latest.
    """

    def __init__(self, *, deadline_s: float | None = None, save_every_s: float = 600) -> None:
        self.deadline_s = deadline_s
        self.save_every_s = save_every_s
        self._asked: str | None = None
        self._saved_at = time.monotonic()

    @property
    def cause(self) -> str | None:
        """Why the job has to stop; None while it may go on."""
        if self._asked is None and _noted:
            self._asked = _noted[0]
        if self._asked is None and self.deadline_s is not None and time.time() >= self.deadline_s:
            self._asked = "deadline"
        return self._asked

    def is_set(self) -> bool:
        return self.cause is not None

    def request(self, cause: str) -> None:
        """Ask to stop from inside the process."""
        self._asked = self._asked or cause

    def save_due(self) -> bool:
        if time.monotonic() - self._saved_at < self.save_every_s:
            return False
        self._saved_at = time.monotonic()
        return True


def asked_early(end: float | None, lead_s: float) -> bool:
    """Whether a SIGUSR1 that comes now is a person's, or a drill's: SLURM's own comes up to a minute before it was asked for.

    Args:
        end: when the job has to end (seconds since the epoch); None where nobody knows.
    """
    return end is not None and time.time() < end - lead_s - EARLY_S


def deadline_from_environment(lead_s: float) -> float | None:
    """When a job has to stop by itself: SLURM's end time less the lead (at most half of what is left); None outside SLURM."""
    end = os.environ.get("SLURM_JOB_END_TIME") or os.environ.get("TRIBUNAL_END_TIME")  # the latter by the local runner
    return float(end) - min(lead_s, (float(end) - time.time()) / 2) if end else None
