"""The same graph without SLURM: time limits, signals and further generations, through submitit's local executor.

    python -m tribunal.cluster.local checkpoints/<experiment>/submissions/0001

One runner process plays the controller: it starts a job's tasks when the jobs that it reads have ended, as many at a time as the
machine has cores and GPUs for. What starts and stops a task is ``local_executor``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tribunal.cluster import preemption, snapshot
from tribunal.cluster.budget import FINAL, decide
from tribunal.cluster.job import Job
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.cluster.lease import _process_start as process_start
from tribunal.cluster.ledger import Ledger
from tribunal.core import receipts
from tribunal.core.errors import UserError
from tribunal.core.storage import read_json, write_json

STATE = "local.json"
POLL_S = 0.1


RUNNER = "import os, sys; sys.path.insert(0, sys.argv[2]); from tribunal.cluster.local import main; main()"


def start(folder: Path, code: Path) -> int:
    """Start the runner in the background; it outlives this terminal. Returns its process id."""
    log = (folder / "runner.log").open("ab")
    command = [sys.executable, "-u", "-c", RUNNER, str(folder), str(code)]
    with log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return process.pid


def alive(folder: Path) -> bool:
    """Whether a submission's runner still lives on this host."""
    state = read_state(folder)
    return state is not None and state["host"] == os.uname().nodename and process_start(state["pid"]) == state["started"]


def cancel(folder: Path) -> bool:
    """Ask a submission's runner to stop its tasks (they save and stay stopped); False when it is gone."""
    state = read_state(folder)
    if state is None or not alive(folder):
        return False
    os.kill(state["pid"], signal.SIGTERM)
    return True


def read_state(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE
    return read_json(path) if path.exists() else None


class Runner:
    """Plays the controller for one submission.

    Args:
        folder: the submission's folder, with its record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_json(folder / snapshot.RECORD)
        self.environment = self.record["environment"]
        self.cpus = os.cpu_count() or 1
        self.gpus = visible_gpus()
        self.stopping = False
        self.waiting: list[tuple[str, int]] = [
            (job, index) for job, entry in self.record["jobs"].items() for index in entry["local_indices"]
        ]
        self.running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], list[str]]] = {}
        self.tasks: dict[str, dict[str, Any]] = {f"{job}/{index}": {"state": "waiting"} for job, index in self.waiting}

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._note()
        while self.running or (self.waiting and not self.stopping):
            self._reap()
            if not self.stopping:
                self._start_ready()
            time.sleep(POLL_S)
        for job, index in self.waiting:
            self.tasks[f"{job}/{index}"]["state"] = "cancelled"
        self._note()
        return 0 if all(task.get("code") == 0 for task in self.tasks.values()) else 1

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        for process, _gpus in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _start_ready(self) -> None:
        for job, index in list(self.waiting):
            entry = self.record["jobs"][job]
            if any(parent == other for parent in entry["parents"] for other, _ in [*self.waiting, *self.running]):
                continue
            if missing := [need for need in entry["needs"] if not self._receipt(need).exists()]:
                self._set(job, index, state="not started", why=f"{missing[0]} has not finished")
                self.waiting.remove((job, index))
                continue
            if len([1 for other, _ in self.running if other == job]) >= (entry["throttle"] or self.cpus):
                continue
            cpus, gpus = min(entry["cpus"], self.cpus), min(entry["gpus"], len(self.gpus))
            busy = sum(min(self.record["jobs"][other]["cpus"], self.cpus) for other, _ in self.running)
            taken = {gpu for _, held in self.running.values() for gpu in held}
            free = [gpu for gpu in self.gpus if gpu not in taken]
            if busy + cpus > self.cpus or len(free) < gpus:
                continue
            self.waiting.remove((job, index))
            self._start(job, index, free[:gpus])

    def _start(self, job: str, index: int, gpus: list[str]) -> None:
        entry = self.record["jobs"][job]
        from tribunal.cluster.local_executor import Executor

        executor = Executor(Path(entry["logs"]), self.record["max_generations"], self.environment)
        command = [*entry["command"], *(["--shard", f"{index}/{entry['shards']}"] if entry["shards"] > 1 else [])]
        process = executor.start(command, limit_s=entry["limit_s"], lead_s=entry["lead_s"], gpus=",".join(gpus))
        self.running[job, index] = (process, gpus)
        self._set(job, index, state="running", pid=process.pid, log=str(Path(entry["logs"]) / f"{process.pid}_0_log.out"))

    def _reap(self) -> None:
        for (job, index), (process, _) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[job, index]
                self._set(job, index, state="cancelled" if self.stopping and code else "ended", code=code)

    def _receipt(self, job: str) -> Path:
        return Path(self.environment["TRIBUNAL_ROOT"]) / "results" / self.record["experiment"] / job / receipts.RECEIPT

    def _set(self, job: str, index: int, **facts: Any) -> None:
        self.tasks[f"{job}/{index}"].update(facts)
        self._note()

    def _note(self) -> None:
        pid = os.getpid()
        write_json(self.folder / STATE, {"pid": pid, "started": process_start(pid), "host": os.uname().nodename, "tasks": self.tasks})


def run_generation(job: Job[Any]) -> int:
    """One generation under the runner; the exit code says whether the job may go on (75), by the same budgets as on SLURM."""
    ledger, shard = Ledger(job.state / "generations.jsonl"), str(job.shard)
    try:
        code = run(job)
    except UserError:
        raise
    except Exception:
        logging.exception("%s: generation failed", job.name)
        code = 1
    rows = ledger.generations(shard)
    if code == FINISHED or not rows or not rows[-1]["ended"]:
        return code
    end, lead_s = float(os.environ["TRIBUNAL_END_TIME"]), job.experiment.slurm.signal_lead_s
    if rows[-1]["cause"] == "time limit" and preemption.asked_early(end, lead_s):
        rows[-1]["cause"] = "asked"
    decision = decide(rows, job.experiment.slurm)
    resumable = decision.go_on or rows[-1]["cause"] in FINAL
    ledger.decided(shard, rows[-1]["epoch"], next="local" if decision.go_on else "nothing", why=decision.why, cause=rows[-1]["cause"])
    print(f"{job.name}: {decision.why}", flush=True)
    return CONTINUE if resumable else 1


def visible_gpus() -> list[str]:
    """Device numbers of this machine's GPUs, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device.strip() not in ("", "-1")]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def main() -> None:
    sys.exit(Runner(Path(sys.argv[1])).run())


if __name__ == "__main__":
    main()
