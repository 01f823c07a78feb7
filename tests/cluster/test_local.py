"""One task on this machine hears what it would hear on SLURM, and goes on for as many rounds as it asks for."""

from __future__ import annotations

import os
import sys

import pytest

from tribunal.cluster.local_executor import Executor

LISTENER = """
import os, signal, sys, time
heard = open(sys.argv[1], "a", buffering=1)
stop = []
def note(number, frame):
    print(signal.Signals(number).name, file=heard)
    stop.append(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
print("start", os.environ["TRIBUNAL_GENERATION"], file=heard)
end = float(os.environ["TRIBUNAL_END_TIME"])
while len(stop) < int(sys.argv[2]) and time.time() < end + 20:
    time.sleep(0.01)
sys.exit(75 if int(os.environ["TRIBUNAL_GENERATION"]) + 1 < int(sys.argv[3]) else 0)
"""


def start(tmp_path, signals, rounds, *, limit_s, lead_s):
    script = tmp_path / "listener.py"
    script.write_text(LISTENER)
    here = os.pathsep.join(path for path in sys.path if path)
    executor = Executor(tmp_path / "logs", 50, {"PYTHONPATH": here})
    command = [sys.executable, str(script), str(tmp_path / "heard"), str(signals), str(rounds)]
    process = executor.start(command, limit_s=limit_s, lead_s=lead_s, gpus="")
    return process, tmp_path / "heard"


@pytest.mark.parametrize(("signals", "expected"), [(1, ["SIGUSR1"]), (2, ["SIGUSR1", "SIGTERM"])])
def test_the_early_signal_comes_before_the_limit_and_sigterm_at_it(tmp_path, signals, expected):
    process, heard = start(tmp_path, signals, 1, limit_s=8, lead_s=2)
    assert process.wait(60) == 0
    assert heard.read_text().splitlines() == ["start 0", *expected]


def test_more_rounds_than_submitits_six_and_the_last_exit_code(tmp_path):
    process, heard = start(tmp_path, 1, 8, limit_s=4, lead_s=2.5)
    assert process.wait(120) == 0
    lines = heard.read_text().splitlines()
    assert lines[::2] == [f"start {n}" for n in range(8)]
    assert {*lines[1::2]} <= {"SIGUSR1", "SIGTERM"}  # the latter where the machine was slow to start it
