"""The real SLURM that these tests run on: started once, ended with the session where this session started it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bench import Bench

CLUSTER = Path(__file__).with_name("cluster.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> Iterator[str]:
    """SLURM_CONF of a running four-node cluster. Skips, and says why, where there is none; not in CI."""
    check = subprocess.run([CLUSTER, "check"], capture_output=True, text=True)
    if check.returncode not in (0, 3):
        why = f"no real SLURM for these tests: {check.stdout.strip()}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    started = subprocess.run([CLUSTER, "start"], capture_output=True, text=True, timeout=600)
    if started.returncode != 0:
        pytest.fail(f"{CLUSTER.name} start: {started.stderr}")
    yield subprocess.run([CLUSTER, "env"], capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    if check.returncode == 3:
        subprocess.run([CLUSTER, "stop"], check=True, timeout=120)


@pytest.fixture
def bench(slurm: str, tmp_path: Path) -> Iterator[Bench]:
    """A folder with an experiment of its own, whose jobs are cancelled and whose processes are ended afterwards."""
    made = Bench(tmp_path, slurm)
    yield made
    made.clean_up()
