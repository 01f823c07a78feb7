"""The math-verify process: it never hangs its caller, never outlives it, and never touches its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tribunal.datasets import _symbolic


@pytest.fixture
def worker():
    assert _symbolic.compare("1+1", "2") == "equal"
    process = _symbolic._worker._process
    assert process is not None
    return process


def test_expressions_are_compared_mathematically():
    assert _symbolic.compare("x \\cdot 2", "2x") == "equal"
    assert _symbolic.compare("x^2", "2x") == "different"
    assert _symbolic.compare("", "2x") == "unreadable"
    assert _symbolic.grade_whole("First 3, no: the answer is \\boxed{2x}.", "x+x") == "equal"


def test_one_process_serves_all_questions(worker):
    _symbolic.compare("3", "4")
    assert _symbolic._worker._process is worker


def test_signals_meant_for_the_job_do_not_stop_it(worker):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        worker.send_signal(number)
    assert _symbolic.compare("3+1", "4") == "equal"
    assert _symbolic._worker._process is worker
    assert os.getpgid(worker.pid) != os.getpgid(os.getpid())


def test_a_running_alarm_and_handler_of_the_caller_are_left_alone(worker):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        _symbolic.compare("x+x", "2x")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_killed_process_is_replaced_and_the_question_answered(worker):
    worker.kill()
    assert _symbolic.compare("3+1", "4") == "equal"
    assert _symbolic._worker._process is not worker


def test_a_stopped_process_is_given_up_after_the_outer_timeout(worker, monkeypatch):
    monkeypatch.setattr(_symbolic, "OUTER_TIMEOUT_S", 0.2)
    worker.send_signal(signal.SIGSTOP)
    assert _symbolic.compare("3+1", "4") == "timeout"
    assert worker.poll() is not None
    monkeypatch.undo()
    assert _symbolic.compare("3+1", "4") == "equal"


def test_it_dies_with_a_caller_that_is_killed():
    code = (
        "import os, signal\nfrom tribunal.datasets import _symbolic\n_symbolic.compare('1', '2')\n"
        "print(_symbolic._worker._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forked_child_has_a_process_of_its_own(worker):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = _symbolic.compare("3+1", "4")
        os.write(write, f"{outcome} {_symbolic._worker._process.pid}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    outcome, pid = os.read(read, 100).decode().split()
    assert outcome == "equal" and int(pid) != worker.pid
    assert _symbolic.compare("3+1", "4") == "equal" and _symbolic._worker._process is worker


def test_neither_the_grader_nor_its_process_imports_torch():
    code = "import sys, tribunal.datasets.answers, tribunal.datasets._symbolic_worker as w; w._load(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
