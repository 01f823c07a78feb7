"""SIGKILL at random moments: whatever was announced as durable is there and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")
HERE = Path(__file__).resolve().parents[2]


def harness(folder: Path, rounds: int, seed: int, source: str | None = None) -> subprocess.CompletedProcess:
    script = HARNESS if source is None else folder.with_suffix(".py")
    if source is not None:
        script.write_text(source)
    command = [sys.executable, str(script), str(folder), str(rounds), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(HERE)})


def test_stores_survive_200_kills_at_random_moments(tmp_path):
    folder = tmp_path / "stores"
    folder.mkdir()
    result = harness(folder, 210, seed=1)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["killed"] == 210
    assert summary["unit"] > 100 and summary["state"] > 20, f"the children hardly got to work: {summary}"


HASHED = "record.update(file=path.name, sha256=sha256_file(path))"


@pytest.mark.parametrize(
    ("line", "broken", "message"),
    [
        ("journal.append({str(count): record})", "pass", "units were announced"),
        (HASHED, f"{HASHED}; path.write_text('torn')", "is damaged"),
        ("store.save(lambda", "(lambda *_: 0)(lambda", "was announced"),
    ],
)
def test_the_harness_notices_a_store_that_is_broken_on_purpose(tmp_path, line, broken, message):
    folder = tmp_path / "stores"
    folder.mkdir()
    source = HARNESS.read_text()
    assert source.count(line) == 1
    result = harness(folder, 40, seed=2, source=source.replace(line, broken))
    assert message in result.stderr
