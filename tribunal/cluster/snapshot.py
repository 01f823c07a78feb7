"""What was submitted, kept beside the state: the code and the resolved experiment, so that edits made while a job waits
in the queue change nothing.

    checkpoints/<experiment>/submissions/code-<sha256>/    the packages, stored once per version of the code
    checkpoints/<experiment>/submissions/0001/             experiment.yaml, submission.json, scripts, logs
    checkpoints/<experiment>/submissions/slurm-<id>/       experiment.yaml of a job submitted by hand (``by_hand``)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tribunal.cluster.job import root
from tribunal.core.config import Experiment
from tribunal.core.errors import StorageError
from tribunal.core.storage import fsync_folder, make_folder, read_json, storage_errors, write_atomic

PACKAGES = ("tribunal", "jobs")
RECORD = "submission.json"
COMMIT = "commit.txt"
RUN_JOB = "run_job.py"
ENTRY = '''"""Start one job from this snapshot: python run_job.py JOB EXPERIMENT.yaml [--shard I/N]
or stages, one after the other:  python run_job.py --stages PIPELINE EXPERIMENT.yaml

Started as a file, so this folder comes first on sys.path; ``-m`` would put the current folder there.
"""

import os
import sys

from tribunal.cluster import preemption

preemption.install()  # before anything heavy is imported
if "TRIBUNAL_DRILL" in os.environ:
    from tribunal.cluster import drill_points

    drill_points.arm(os.environ["TRIBUNAL_DRILL"])

from tribunal.cluster import launch  # noqa: E402

if sys.argv[1] == "--stages":
    from tribunal.cluster.__main__ import main

    sys.exit(launch.guarded(lambda: main(sys.argv[2:])))
launch.main(sys.argv[1], sys.argv[2:])
'''


def submissions(experiment: str) -> Path:
    """The folder of an experiment's submissions."""
    return root() / "checkpoints" / experiment / "submissions"


def new_submission(experiment: str) -> Path:
    """Claim the next number; two submitters never get the same."""
    folder = make_folder(submissions(experiment))
    number = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (folder / f"{number:04d}").mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(folder, error, "create a folder in") from error
        fsync_folder(folder)
        return folder / f"{number:04d}"


def records(experiment: str) -> list[dict[str, Any]]:
    """Every submission's record, oldest first; one that was never completed is left out."""
    folder = submissions(experiment)
    if not folder.is_dir():
        return []
    numbers = sorted(path for path in folder.iterdir() if path.name.isdigit())
    return [{**read_json(path / RECORD), "folder": str(path)} for path in numbers if (path / RECORD).exists()]


def write_experiment(experiment: Experiment, lead_s: int, path: Path) -> None:
    """The experiment with every default filled in and every override applied."""
    slurm = experiment.slurm.model_dump(mode="json", exclude_none=True)
    slurm["jobs"] = {job: own for job, own in slurm["jobs"].items() if own}
    data = {
        "name": experiment.name,
        "seed": experiment.seed,
        "model": experiment.model.model_dump(mode="json"),
        "dataset": experiment.dataset.model_dump(mode="json"),
        "slurm": {**slurm, "signal_lead_s": lead_s},
        **{job: section.model_dump(mode="json") for job, section in experiment.sections.items()},
    }
    head = f"# Resolved from {experiment.path}; this is what the submitted jobs read.\n"
    write_atomic(path, head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def code_folder(experiment: str) -> Path:
    """Where the code as it is now belongs, named by its bytes."""
    total = hashlib.sha256(ENTRY.encode())
    for name, path in sorted(_files()):
        with storage_errors(path, "read"):
            total.update(json.dumps([name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    return submissions(experiment) / f"code-{total.hexdigest()[:16]}"


def write_code(experiment: str) -> Path:
    """Copy the packages as they are now (uncommitted edits too); returns the folder, which holds ``run_job.py``."""
    target = code_folder(experiment)
    if target.is_dir():
        return target
    staging = make_folder(target.parent) / f".{target.name}.{os.getpid()}"
    with storage_errors(staging):
        shutil.rmtree(staging, ignore_errors=True)
        for name, path in _files():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / name)
        (staging / RUN_JOB).write_text(ENTRY)
        commit = commit_of_code()
        if commit:
            (staging / COMMIT).write_text(commit + "\n")
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # else another submitter was faster with the same bytes
                raise
            shutil.rmtree(staging)
        fsync_folder(target.parent)
    return target


def commit_of_code() -> str | None:
    """The commit of the checkout, '+' where files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    noted = folder / COMMIT
    if noted.exists():
        return noted.read_text().strip()
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return None
    changed = subprocess.run(
        ["git", "-C", str(folder), "status", "--porcelain", "--", *PACKAGES], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _files() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        folder = Path(next(iter(importlib.import_module(package).__path__)))
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(folder).as_posix()}", path
