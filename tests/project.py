"""A copy of the project with the test payload's jobs, for commands that start processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
NOTHING = '''"""A dataset without problems."""

from tribunal.core.config import DatasetConfig


class Dataset(DatasetConfig):
    def problems(self):
        return []
'''


class Project:
    """A project folder and a root for state and results.

    Args:
        folder: where the copy goes.
        environment: on top of this process's.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder / "project"
        self.root = folder / "run"
        self.root.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", "builtin")
        shutil.copytree(HERE.parent / "tribunal", self.folder / "tribunal", ignore=ignore)
        shutil.copytree(HERE / "slurm" / "payload" / "jobs", self.folder / "jobs", ignore=ignore)
        (self.folder / "tribunal" / "datasets" / "nothing.py").write_text(NOTHING)
        self.environment = {
            **os.environ,
            "TRIBUNAL_ROOT": str(self.root),
            "PYTHONPATH": str(self.folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # the copy is compiled once, not by each of its many processes
            **(environment or {}),
        }

    def experiment(self, name: str = "numbers", **blocks: Any) -> Path:
        """Write an experiment file; ``blocks`` are its sections."""
        path = self.folder / f"{name}.yaml"
        data = {"name": name, "model": {"name": "none"}, "dataset": {"name": "nothing"}, **blocks}
        path.write_text(yaml.safe_dump(data))
        return path

    def tribunal(
        self, *words: object, check: int | None = 0, environment: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in the project's folder; ``check`` is the exit code it must end with."""
        code = "from tribunal.cli import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert check is None or result.returncode == check, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def rows(self, name: str = "numbers") -> list[dict[str, Any]]:
        """What ``tribunal status --json`` says."""
        rows: list[dict[str, Any]] = json.loads(self.tribunal("status", name, "--json").stdout)[0]["rows"]
        return rows

    def receipt(self, job: str, name: str = "numbers") -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads((self.root / "results" / name / job / "receipt.json").read_text())
        return receipt

    def finished(self, job: str, name: str = "numbers") -> bool:
        return (self.root / "results" / name / job / "receipt.json").exists()


def until(met: Callable[[], Any], seconds: float = 180, *, what: str = "") -> Any:
    """Wait for a condition and return its value; fail with what was waited for. It rests as long as a look takes."""
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if value := met():
            return value
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what or met}"
        time.sleep(max(0.1, time.monotonic() - began))
