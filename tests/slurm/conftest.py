"""The real SLURM that these tests run on: started once, ended with the session where this session started it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.bench import Bench

CLUSTER = Path(__file__).with_name("cluster.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> Iterator[str]:
    """SLURM_CONF of a running cluster, shared by all test processes. Skips, and says why, where there is none; not in CI."""
    conf = subprocess.run([CLUSTER, "env"], capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    record = Path(f"{Path(conf).parent}-users.json")
    with _users(record) as users:
        check = subprocess.run([CLUSTER, "check"], capture_output=True, text=True)
        if check.returncode not in (0, 3):
            why = f"no real SLURM for these tests: {check.stdout.strip()}"
            if os.environ.get("CI"):
                pytest.fail(why)
            pytest.skip(why)
        if check.returncode == 3:
            started = subprocess.run([CLUSTER, "start"], capture_output=True, text=True, timeout=600)
            if started.returncode != 0:
                pytest.fail(f"{CLUSTER.name} start: {started.stderr}")
            users["started by tests"] = True
        users["pids"].append(os.getpid())
    yield conf
    with _users(record) as users:
        users["pids"].remove(os.getpid())
        if not users["pids"] and users["started by tests"]:
            subprocess.run([CLUSTER, "stop"], check=True, timeout=120)
            users["started by tests"] = False


@contextmanager
def _users(path: Path) -> Iterator[dict[str, Any]]:
    """Who uses the cluster, under a lock: the first of several test processes starts it, the last one ends it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        users = json.loads(file.read() or '{"pids": [], "started by tests": false}')
        users["pids"] = [pid for pid in users["pids"] if Path(f"/proc/{pid}").exists()]
        yield users
        file.truncate(0)
        file.write(json.dumps(users))


@pytest.fixture
def bench(slurm: str, tmp_path: Path) -> Iterator[Bench]:
    """A folder with an experiment of its own, whose jobs are cancelled and whose processes are ended afterwards."""
    made = Bench(tmp_path, slurm)
    yield made
    made.clean_up()
