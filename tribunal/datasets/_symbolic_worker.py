"""The process that runs math-verify: one JSON request per line on stdin, one JSON reply per line on stdout.

    python -m tribunal.datasets._symbolic_worker

math-verify keeps time with SIGALRM and can hang inside C code, so it never runs in a job's own process. This process
is started by ``_symbolic`` and dies with it; signals meant for the job (time limit, preemption) do not stop it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

BUDGET_S = 3  # for parsing and comparing together; the parent waits longer and then ends this process
MEMORY_GB = 4


class OutOfTimeError(BaseException):
    """Raised by the alarm; a BaseException, so that no ``except Exception`` on the way swallows it."""


def main() -> None:
    for ignored in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    _die_with_parent()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = MEMORY_GB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not reach the protocol
    answer = _load()
    print(json.dumps({"ready": True}), file=replies)
    signal.signal(signal.SIGALRM, _out_of_time)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            signal.alarm(BUDGET_S)
            outcome = answer(request)
            signal.alarm(0)
        except OutOfTimeError:
            outcome = "timeout"
        except (MemoryError, RecursionError):
            signal.alarm(0)
            outcome = "unreadable"
        print(json.dumps({"id": request["id"], "outcome": outcome}), file=replies)


def _load() -> Callable[[dict[str, Any]], str]:
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)

    def expressions(text: str) -> list[Any]:
        found = parse(text, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=0)
        return found if any(not isinstance(one, str) for one in found) else []  # a list of texts only: nothing was understood

    def answer(request: dict[str, Any]) -> str:
        wrap = "{}" if request["whole"] else "${}$"
        gold, given = expressions(f"${request['gold']}$"), expressions(wrap.format(request["given"]))
        if not gold or not given:
            return "unreadable"
        return "equal" if verify(gold, given, timeout_seconds=0) else "different"

    return answer


def _out_of_time(signum: int, frame: object) -> None:
    raise OutOfTimeError


def _die_with_parent() -> None:
    """Linux ends this process when its parent dies; elsewhere the closed stdin does, between two requests."""
    if sys.platform != "linux":
        return
    import ctypes

    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it died before the line above
        sys.exit(1)


if __name__ == "__main__":
    main()
