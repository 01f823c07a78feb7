"""What no CPU shows and no GPU is needed for: in a process of its own, whose GPU is host memory (see gpu.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def on_gpu(*what: str) -> None:
    """Run tests in a process whose GPU is host memory; show what they print where one fails."""
    if shutil.which("g++") is None:
        assert "TRIBUNAL_REQUIRE_HOST_GPU" not in os.environ, "g++ is missing"
        pytest.skip("no g++ to build the GPU of host memory with")
    command = [sys.executable, "-m", "pytest", "-p", "tests.host_gpu.gpu", "-p", "no:cacheprovider", "-p", "no:xdist", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]


@pytest.mark.slow
def test_every_job_runs_in_bfloat16_and_resumes_exactly_and_the_hot_loops_do_not_wait_for_the_gpu():
    on_gpu("tests/host_gpu/on_gpu.py")
