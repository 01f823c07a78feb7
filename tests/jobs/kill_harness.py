"""Run a job in whole processes that end by SIGKILL at random moments, then let it finish; print the digests.

    python tests/jobs/kill_harness.py EXPERIMENT.yaml KILLS SEED JOB [JOB ...]

The processes are forked from this one, which has torch and the jobs imported already, so a start takes milliseconds. Jobs
run in the order given, each reading the results of the ones before. Roots: ``undisturbed/`` and ``killed/`` in the current folder.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tribunal.cluster.launch import make_job, run_job
from tribunal.core.config import load_experiment
from tribunal.core.receipts import read_receipt

for heavy in ("matplotlib.pyplot", "tribunal.models.training", "tribunal.models.loading", "tribunal.probes.training"):
    importlib.import_module(heavy)  # once, before the forks: a kill while one of them imports tells nothing


def forked(run: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run()
        except BaseException:  # noqa: BLE001  (the child must end here, whatever happened)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def finish(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"a process ended with {os.waitstatus_to_exitcode(status)}")


def main(path: Path, kills: int, seed: int, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    experiment = load_experiment(path)
    for job in jobs:
        os.environ["TRIBUNAL_ROOT"] = str(Path("undisturbed").absolute())
        began = time.monotonic()
        finish(forked(lambda job=job: run_job(job, experiment, quiet=True)))
        took = time.monotonic() - began
        expected = _digest(make_job(job, experiment).results)

        os.environ["TRIBUNAL_ROOT"] = str(Path("killed").absolute())
        results = make_job(job, experiment).results
        killed, digests = 0, set()
        while killed < kills or not results.exists():
            if results.exists():  # it got to its end between two kills: once more from the start
                digests.add(_digest(results))
                shutil.rmtree(results)
            pid = forked(lambda job=job: run_job(job, experiment, quiet=True))
            if killed >= kills:
                finish(pid)
                continue
            time.sleep(draw.random() * took * 0.7)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
        digests.add(_digest(results))
        finish(forked(lambda job=job: run_job(job, experiment, quiet=True)))  # the last kill may have met the clean-up
        left = [str(p) for p in Path("killed").rglob("*") if p.name.endswith(".tmp") or ".staging" in p.name or p.name.startswith("tmp-")]
        left += [str(p) for p in Path("killed/checkpoints").rglob("*") if p.is_file()]
        print(json.dumps({"job": job, "killed": killed, "expected": expected, "digests": sorted(digests), "left": left}), flush=True)


def _digest(results: Path) -> str:
    receipt = read_receipt(results)
    assert receipt is not None
    return receipt["digest"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
