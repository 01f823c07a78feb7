"""One task on this machine, generation after generation, through submitit's local executor.

submitit's own controller starts at most 6 rounds and ends tasks with SIGINT; ours starts a task again that saved and asked to
go on (exit code 75), up to ``max_generations``, and sends what SLURM sends: SIGUSR1 before the limit, SIGTERM at it,
SIGKILL 30 s later.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.local import local

from tribunal.cluster.launch import CONTINUE, FINISHED

KILL_WAIT_S = 30.0
POLL_S = 0.1
CONTROLLER = (
    "import os, sys; sys.path[:0] = sys.argv[3].split(os.pathsep); from pathlib import Path; "
    "from tribunal.cluster.local_executor import Controller; sys.exit(Controller(Path(sys.argv[1]), int(sys.argv[2])).run())"
)


class Controller(local.Controller):
    """Runs one task through its generations; ends with the last one's exit code."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__(folder)
        self.rounds = rounds
        self.cancelled = False
        signal.signal(signal.SIGTERM, self._cancel)

    def _cancel(self, number: int, _: Any) -> None:
        self.cancelled = True
        self._send(signal.SIGTERM)

    def run(self, max_retry: int = 6) -> int:  # type: ignore[override]
        del max_retry  # submitit's bound; ours is the experiment's max_generations
        code = CONTINUE
        for generation in range(self.rounds):
            if self.cancelled:
                return CONTINUE
            os.environ["TRIBUNAL_GENERATION"] = str(generation)
            os.environ["TRIBUNAL_END_TIME"] = str(time.time() + self.timeout_s)
            self.start_tasks()
            try:
                code = max(abs(code or 0) for code in self.wait())
            finally:
                self._send(signal.SIGKILL)
                for file in {*self.stdouts, *self.stderrs}:
                    file.close()
                self.tasks, self.stdouts, self.stderrs = [], [], []
            if code != CONTINUE or self.cancelled:
                break
        return code

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        end = time.monotonic() + self.timeout_s
        steps = [(end - self.signal_delay_s, signal.SIGUSR1), (end, signal.SIGTERM), (end + KILL_WAIT_S, signal.SIGKILL)]
        while any(task.poll() is None for task in self.tasks):
            if any(task.returncode not in (None, FINISHED, CONTINUE) for task in self.tasks):
                self._send(signal.SIGKILL)  # one dead task ends the step, as srun --kill-on-bad-exit does
            while steps and time.monotonic() >= steps[0][0]:
                self._send(steps.pop(0)[1])
            time.sleep(POLL_S)
        return [task.returncode for task in self.tasks]

    def _send(self, number: signal.Signals) -> None:
        for task in self.tasks:
            if task.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    task.send_signal(number)


class Executor(local.LocalExecutor):
    """submitit's LocalExecutor that starts our command under our controller, in a session of its own."""

    def __init__(self, folder: Path, rounds: int, environment: dict[str, str]) -> None:
        super().__init__(folder)
        self.rounds = rounds
        self.environment = environment

    def start(self, command: Sequence[str], *, limit_s: float, lead_s: float, gpus: str) -> subprocess.Popen[bytes]:
        """Start one task's controller; its process id is the job id that names the logs."""
        environment = {
            **os.environ,
            **self.environment,
            "SUBMITIT_LOCAL_NTASKS": "1",
            # USR1 is ignored until Python's handlers stand, as in the scripts for SLURM
            "SUBMITIT_LOCAL_COMMAND": shlex.join(["/bin/sh", "-c", 'trap "" USR1; exec "$@"', "tribunal", *command]),
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(limit_s)),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(int(lead_s)),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "CUDA_VISIBLE_DEVICES": gpus,
        }
        start = [sys.executable, "-c", CONTROLLER, str(self.folder), str(self.rounds), environment["PYTHONPATH"]]
        return subprocess.Popen(start, env=environment, stdin=subprocess.DEVNULL)
