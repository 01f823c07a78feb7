"""The test that every job gets for free: stop it at each point where it looks, resume in a fresh object, compare digests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tribunal.cluster.job import Job
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.cluster.preemption import StopSignal
from tribunal.core.receipts import read_receipt


class StopAfter(StopSignal):
    """Asks to stop from its n-th look on; counts its looks."""

    def __init__(self, looks: int | None) -> None:
        super().__init__(save_every_s=float("inf"))
        self.left = looks
        self.looks = 0

    @property
    def cause(self) -> str | None:
        self.looks += 1
        return None if self.left is None or self.looks <= self.left else "test"


def undisturbed(make: Callable[[], Job[Any]]) -> tuple[dict[str, Any], int]:
    """Run to the end in one go; returns the receipt and how often the work looked at the stop signal."""
    stop = StopAfter(None)
    job = make()
    assert run(job, stop=stop, quiet=True) == FINISHED
    receipt = read_receipt(job.results)
    assert receipt is not None
    return receipt, stop.looks


def resumed(
    make: Callable[[], Job[Any]], looks: int, *, every: bool = False, after_stop: Callable[[Job[Any]], None] | None = None
) -> dict[str, Any]:
    """Stop after ``looks`` looks, resume in fresh objects (stopping again as late each time when ``every``), return the receipt.

    ``after_stop`` may spoil the saved state on purpose, for the test of the test.
    """
    for generation in range(200):
        job = make()
        code = run(job, stop=StopAfter(looks if generation == 0 or every else None), quiet=True)
        if code == FINISHED:
            assert not job.state.exists(), f"state left behind: {sorted(job.state.rglob('*'))}"
            left = [path for path in job.results.parent.rglob(".*")]
            assert not left, f"temporary files left behind: {left}"
            receipt = read_receipt(job.results)
            assert receipt is not None
            return receipt
        assert code == CONTINUE
        if after_stop is not None:
            after_stop(job)
    raise AssertionError("200 generations without an end")


def assert_resume_is_exact(
    make: Callable[[Path], Job[Any]], tmp_path: Path, monkeypatch: Any, *, points: int = 8, every: bool = True
) -> None:
    """Digest after a stop at up to ``points`` evenly spread looks (and stopped again each time) equals the undisturbed one's.

    Args:
        make: builds a fresh job whose roots lie in the given folder (TRIBUNAL_ROOT is set to it).
    """

    def at(folder: Path) -> Callable[[], Job[Any]]:
        monkeypatch.setenv("TRIBUNAL_ROOT", str(folder))
        return lambda: make(folder)

    expected, looks = undisturbed(at(tmp_path / "undisturbed"))
    assert looks >= 2, "the work never looked at the stop signal"
    chosen = sorted({round(i * (looks - 1) / max(points - 1, 1)) for i in range(points)})
    for point in chosen:
        receipt = resumed(at(tmp_path / f"stopped-{point}"), point)
        assert receipt["digest"] == expected["digest"], f"stopped after {point} of {looks} looks: another digest"
        assert receipt["totals"]["units"] == expected["totals"]["units"], f"stopped after {point} looks: units were done twice or lost"
        assert len(receipt["generations"]) == 2
    if every:
        receipt = resumed(at(tmp_path / "stopped-often"), max(2, looks // 5), every=True)
        assert receipt["digest"] == expected["digest"], "stopped several times: another digest"


CHANGES = ("mkdir", "link", "rename", "replace", "unlink", "rmdir")


@contextlib.contextmanager
def before_change(number: int, act: Callable[[], Any], changes: Sequence[str] = CHANGES) -> Iterator[Callable[[], bool]]:
    """Call ``act`` before this process's ``number``-th change of a folder; yields whether that came."""
    left = number

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                act()
            return real(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in changes:
            patch.setattr(os, name, watched(getattr(os, name)))
        yield lambda: left <= 0


def forked(start: Callable[[], int]) -> int:
    """The exit code of a start in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = start()
        finally:
            os._exit(code)  # whatever happened: the tests go on in the other process
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(make: Callable[[], Job[Any]], number: int, changes: Sequence[str] = CHANGES) -> bool:
    """Run in a process that kills itself before its ``number``-th change of a folder; False where it ended before that."""

    def start() -> int:
        with before_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL), changes):
            return run(make(), quiet=True)

    code = forked(start)
    assert code in (FINISHED, -signal.SIGKILL)
    return code != FINISHED


def names_left(root: Path) -> list[str]:
    """Temporary files and folders, and the state of any experiment."""
    return [path.name for path in root.rglob("*") if path.name.startswith((".", "tmp")) or path.parent.name == "checkpoints"]
