"""math-verify behind a process boundary: asked with a timeout, started once, restarted when it hangs or dies."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Literal

from tribunal.core.errors import UserError

Outcome = Literal["equal", "different", "unreadable", "timeout"]

START_TIMEOUT_S = 120.0  # importing sympy from a cold network file system
OUTER_TIMEOUT_S = 8.0  # above the worker's own budget: reached only when it hangs outside Python code
LONGEST = 2_000  # characters of an expression that is worth parsing
DEEPEST = 60  # nested brackets


def compare(given: str, gold: str) -> Outcome:
    """Whether two expressions (LaTeX or plain, without delimiters) are mathematically equal."""
    return _ask(given, gold, whole=False, longest=LONGEST)


def grade_whole(response: str, gold: str) -> Outcome:
    """math-verify's own extraction and comparison on a whole response: an independent second grader."""
    return _ask(response, gold, whole=True, longest=100_000)


def _ask(given: str, gold: str, *, whole: bool, longest: int) -> Outcome:
    if len(given) > longest or len(gold) > LONGEST or _depth(given) > DEEPEST or _depth(gold) > DEEPEST:
        return "unreadable"
    return _worker.ask({"given": given, "gold": gold, "whole": whole})


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


class _Worker:
    """The one worker process of this process (a forked child starts its own)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._asked = 0
        self._received = b""

    def ask(self, request: dict[str, Any]) -> Outcome:
        with self._lock:
            for _ in range(2):
                try:
                    self._start_if_needed()
                    return self._exchange(request)
                except (BrokenPipeError, EOFError):  # it died: killed from outside, or this request crashed it
                    self._end()
                except TimeoutError:
                    self._end()
                    return "timeout"
            if self._asked == 0:
                raise UserError(
                    "the math-verify process did not start; try `python -c 'import math_verify'` and install it with "
                    "`pip install 'math-verify[antlr4_13_2]'` if that fails"
                )
            return "unreadable"

    def _exchange(self, request: dict[str, Any]) -> Outcome:
        assert self._process is not None
        self._asked += 1
        stdin = _pipe(self._process.stdin)
        stdin.write(json.dumps(request | {"id": self._asked}).encode() + b"\n")
        stdin.flush()
        reply = self._reply(OUTER_TIMEOUT_S)
        assert reply["id"] == self._asked, "the worker answered another request"
        outcome: Outcome = reply["outcome"]
        return outcome

    def _start_if_needed(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        if self._owner == os.getpid():
            self._end()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tribunal.datasets._symbolic_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # signals sent to the job's process group do not reach it
        )
        self._owner = os.getpid()
        self._received = b""
        self._reply(START_TIMEOUT_S)

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        out = _pipe(self._process.stdout).fileno()
        ready = select.poll()
        ready.register(out, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not ready.poll(left_s * 1000):
                raise TimeoutError
            block = os.read(out, 65536)
            if not block:
                raise EOFError
            self._received += block
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                _pipe(pipe).close()
            except BrokenPipeError:
                continue  # what was left to write is of no use to a process that is gone
        process.wait()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


_worker = _Worker()
atexit.register(_worker._end)
