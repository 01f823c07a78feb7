"""The page under SLURM: last of its submission, after jobs that were interrupted, and without those that were given up."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import HERE, until
from tests.slurm.test_submit import Cluster


@pytest.fixture
def cluster(slurm: str, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, slurm)
    shutil.copy(HERE.parent / "jobs" / "report.py", made.folder / "jobs")
    yield made
    for task in made.queue("%i"):
        made.call("scancel", task)


def test_the_page_comes_after_an_interrupted_job_and_without_one_that_was_given_up(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    first = {"units": 4, "fail_in_build": True}
    file = cluster.write(count={"units": 12, "wait_for": {"6": str(gate)}}, double={"seconds": 0.0}, first=first)
    cluster.tribunal("submit", file, "report", "first", "count", "double")
    cluster.interrupt("count", units=6)
    gate.touch()
    until(lambda: cluster.done("report"), seconds=240, what="the page")
    receipt = cluster.receipt("report", cluster.name)
    assert list(receipt["config"]["inputs"]) == ["count", "double"]
    page = (cluster.root / "results" / cluster.name / "report.html").read_text()
    ((state, why),) = re.findall(r'>first</th>\s*<td><span class="[^"]*">(\w+)</span><span class="why">([^<]*)<', page)
    assert state == "unfinished" and re.match("failed.*RuntimeError: this stage is broken|completing", why), why
    cluster.gone()
