"""Show how far a work is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tribunal.core.work import Progress, Work

LOG_EVERY_S = 30.0


class ProgressDisplay:
    """Watches a work from a side thread.

    Args:
        name: the job's name.
        quiet: show nothing; ``facts`` still tells the state.
    """

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self.name = name
        self.quiet = quiet
        self._work: Work | None = None
        self._began = (time.monotonic(), 0)

    def facts(self) -> dict[str, Any]:
        """Done, total, unit, and the rate of this generation (units per second)."""
        if self._work is None:
            return {"phase": "loading"}
        now = self._work.progress()
        return {"phase": "running", "done": now.done, "total": now.total, "unit": now.unit, "rate": round(self._rate(now), 6)}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        """Show progress while the body runs, and once more at its end."""
        self._work = work
        self._began = (time.monotonic(), work.progress().done)
        if self.quiet:
            yield
            return
        over = threading.Event()
        show = self._bar if sys.stdout.isatty() else self._lines
        thread = threading.Thread(target=show, args=(work, over), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _rate(self, now: Progress) -> float:
        seconds = time.monotonic() - self._began[0]
        return (now.done - self._began[1]) / seconds if seconds > 0 else 0.0

    def _bar(self, work: Work, over: threading.Event) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, refresh_per_second=5) as bar:
            state = work.progress()
            task = bar.add_task(self.name, total=state.total, completed=state.done, unit=state.unit)
            while not over.wait(0.2):
                state = work.progress()
                bar.update(task, completed=state.done, total=state.total)
            state = work.progress()
            bar.update(task, completed=state.done, total=state.total)

    def _lines(self, work: Work, over: threading.Event) -> None:
        wait = 5.0
        while not over.wait(wait):
            print(self._line(work.progress()), flush=True)
            wait = LOG_EVERY_S
        print(self._line(work.progress()), flush=True)

    def _line(self, now: Progress) -> str:
        rate = self._rate(now)
        of = f" of {now.total}" if now.total is not None else ""
        left = (
            f", {_duration((now.total - now.done) / rate)} left" if now.total is not None and 0 < now.done < now.total and rate > 0 else ""
        )
        return f"{self.name}: {now.done}{of} {now.unit}s, {rate:.3g}/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
