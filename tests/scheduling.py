"""Which worker runs what: tests that wait for SLURM beside tests that compute, and the longest files first.

A test on the real SLURM mostly waits (a requeued job starts again after six seconds, a time limit is a whole minute). Two
workers that both wait leave the cores idle, so at most the workers beyond the second start with such tests, one by one; the others
compute, a whole file each (its fixtures are made once), and take over what is left at the end.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

WAITING = "tests/slurm/"
WHOLE = ("tests/slurm/test_submit.py",)
"""Files of WAITING that share something made once."""
LONGEST = (
    "tests/slurm/test_submit.py",
    "tests/slurm/test_jobs.py",
    "tests/slurm/test_time_limit.py",
    "tests/slurm/test_ranks.py",
    "tests/slurm/test_drill.py",
    "tests/slurm/test_deaths.py",
    "tests/jobs/test_kill.py",
    "tests/host_gpu/test_host_gpu.py",
    "tests/jobs/test_set_aside.py",
    "tests/jobs/test_train_oracle.py",
    "tests/models/test_training.py",
    "tests/models/test_oracle_training.py",
    "tests/jobs/test_calibrate.py",
    "tests/jobs/test_evaluate_oracle.py",
    "tests/jobs/test_generate_traces.py",
    "tests/jobs/test_attribute_direction.py",
    "tests/jobs/test_steer.py",
    "tests/test_setup.py",
    "tests/jobs/test_monitor_traces.py",
    "tests/jobs/test_train_probes.py",
    "tests/jobs/test_oracle_recipe.py",
    "tests/jobs/test_oracle_inputs.py",
    "tests/cluster/test_submission.py",
)
"""Started first, in this order: a long one that starts last leaves the other workers without work."""


def unit_of(nodeid: str) -> str:
    """What one worker runs in one go: a file, or a single test that waits."""
    file = nodeid.split("::", 1)[0]
    return nodeid if file.startswith(WAITING) and file not in WHOLE else file


def order(unit: str) -> int:
    file = unit.split("::", 1)[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Args as xdist gives them."""

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        self.waiting_workers = {f"gw{number}" for number in range(max(1, self.numnodes - 2))}

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        waits = node.gateway.id in self.waiting_workers
        unit = min(self.workqueue, key=lambda unit: (unit.startswith(WAITING) != waits, order(unit)))  # the first of equals
        self.workqueue.move_to_end(unit, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        """A worker needs to know one test beyond the one that it runs; more would be kept from the others."""
        if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)
