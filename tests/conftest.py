"""Shared fixtures: where the optional real input lies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from tests.calibrated import Calibrated


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadfile``, as ``make test`` has it."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.scheduling import Scheduling

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real GSM8K and BBH files; a user's clone has none, so tests on it are skipped there."""
    given = os.environ.get("TRIBUNAL_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real input at {folder} (set TRIBUNAL_TEST_DATA to a folder with gsm8k/ and bbh/)")
    return folder


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A finished calibration of the shipped reasoner; takes about ten seconds, once for all test processes."""
    ours = tmp_path_factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours
    root = shared / "calibrated"
    with (shared / "calibrated.lock").open("a") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("TRIBUNAL_ROOT", str(root))
        return Calibrated(root)  # what is finished is not done again
