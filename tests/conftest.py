"""Shared fixtures: where the optional real input lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real GSM8K and BBH files; a user's clone has none, so tests on it are skipped there."""
    given = os.environ.get("TRIBUNAL_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real input at {folder} (set TRIBUNAL_TEST_DATA to a folder with gsm8k/ and bbh/)")
    return folder
