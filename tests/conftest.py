"""Shared fixtures: where the optional real input lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.calibrated import Calibrated


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
    """A finished calibration of the shipped reasoner; takes about ten seconds, once."""
    root = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIBUNAL_ROOT", str(root))
        return Calibrated(root)
