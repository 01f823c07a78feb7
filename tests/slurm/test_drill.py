"""The drill, on the real SLURM and on this machine: interrupted at every phase in every way, and the same digest each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.project import Project

QUICK: dict[str, Any] = {"count": {"units": 5, "seconds": 0.2}, "double": {"seconds": 0.1}, "slurm": {"cpus": 1, "mem_gb": 1}}


@pytest.fixture
def project(slurm: str, tmp_path: Path) -> Project:
    return Project(tmp_path, {"SLURM_CONF": slurm})


def test_a_drill_on_slurm_survives_20_of_20_and_leaves_nothing(project: Project) -> None:
    said = project.tribunal("drill", project.experiment(**QUICK), "double", "--limit", "0", timeout=400).stdout
    assert "survived 20 of 20, each with the undisturbed run's digest" in said, said
    assert "largest loss: 0 finished units done again" in said
    for line in said.splitlines():
        if ", USR1 " in line or ", requeue " in line:
            assert "went on by itself" in line
    assert not (project.root / "drills").exists()


def test_a_drill_names_what_did_not_survive(project: Project) -> None:
    """A job that forgets a unit on resuming is caught."""
    broken = (project.folder / "jobs" / "double.py").read_text().replace("plan = list(range(len(numbers)))", BROKEN)
    (project.folder / "jobs" / "double.py").write_text(broken)
    said = project.tribunal(
        "drill", project.experiment(**QUICK), "double", "--limit", "0", "--cluster", "local", check=1, timeout=400
    ).stdout
    assert "LOST  double, USR1 within a unit" in said and "ANOTHER DIGEST" in said, said


BROKEN = "plan = list(range(len(numbers) - (self.epoch > 1)))"
