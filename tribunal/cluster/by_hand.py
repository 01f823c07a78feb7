"""What a job submitted by hand runs: a copy of the code and of the resolved experiment, so that later edits change nothing.

    python -m tribunal.cluster.by_hand MODULE EXPERIMENT.yaml [section.key=value ...]    sbatch/task.sh, inside the job
    python -m tribunal.cluster.by_hand --now PIPELINE EXPERIMENT.yaml [section.key=value ...]     sbatch/pipeline.sh, before it queues

SLURM copies the batch script when it is queued, and nothing else. So the copy is made by the job's first start, of an array by the
first of its tasks, and all later starts run it; ``--now`` makes it at once and prints the experiment file to submit and the jobs. Inside a
job the folder of the code and the arguments for Python are printed, one a line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path

from tribunal.cluster import launch, snapshot
from tribunal.cluster.job import root
from tribunal.cluster.pipelines import jobs_of, selected
from tribunal.cluster.site import use_site_values
from tribunal.core.config import Experiment
from tribunal.core.errors import UserError
from tribunal.core.storage import make_folder, read_json, storage_errors, write_json

NOTE, EXPERIMENT = "by_hand.json", "experiment.yaml"


def freeze(experiment: Experiment, folder: Path) -> None:
    """Write the resolved experiment into a folder, with a note of where the code as it is now was copied to."""
    code = snapshot.write_code(experiment.name).resolve()
    snapshot.write_experiment(experiment, experiment.slurm.signal_lead_s, folder / EXPERIMENT)
    write_json(folder / NOTE, {"code": str(code), "commit": snapshot.commit_of_code(), "cluster": os.environ.get("SLURM_CLUSTER_NAME")})


def code_of(folder: Path) -> Path | None:
    """The code that belongs to a folder made by ``freeze``; None where it is none, or a part of it was removed."""
    if not (folder / NOTE).exists() or not (folder / EXPERIMENT).exists():
        return None
    code = Path(read_json(folder / NOTE)["code"])
    return code if (code / snapshot.RUN_JOB).exists() else None


def of_this_job(given: argparse.Namespace) -> Path:
    """The folder of this SLURM job's copies; made where this is its first start."""
    array = "SLURM_ARRAY_JOB_ID" in os.environ
    name = f"slurm-{os.environ['SLURM_ARRAY_JOB_ID' if array else 'SLURM_JOB_ID']}"
    if array or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # the experiment file is not looked at: it may have been edited
        for folder in (root() / "checkpoints").glob(f"*/submissions/{name}"):
            if _ours(folder):
                return folder
    experiment = _open(given)
    folder = make_folder(snapshot.submissions(experiment.name)) / name
    staging = folder.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}")
    with storage_errors(staging):
        staging.mkdir()
        freeze(experiment, staging)
        try:
            staging.rename(folder)
        except OSError:
            if array and _ours(folder):  # another task was faster
                shutil.rmtree(staging)
            else:  # of a job of the same number, long ago
                shutil.rmtree(folder)
                staging.rename(folder)
    return folder


def _ours(folder: Path) -> bool:
    return code_of(folder) is not None and read_json(folder / NOTE)["cluster"] == os.environ.get("SLURM_CLUSTER_NAME")


def _open(given: argparse.Namespace) -> Experiment:
    return launch.open_experiment(given.experiment, given.overrides, given.limit)


def main() -> int:
    module, *words = sys.argv[1:]
    stages = [words.pop(0)] if module in ("tribunal.cluster", "--now") and words else []
    given = launch.arguments("by hand").parse_intermixed_args(words)
    use_site_values()
    if module == "--now":
        jobs_of(stages[0])  # an unknown name is told before a fault of the file
        experiment = _open(given)
        jobs = selected(stages, experiment)
        folder = snapshot.new_submission(experiment.name)
        freeze(experiment, folder)
        print((folder / EXPERIMENT).resolve(), *jobs, sep="\n")
        return 0
    folder, more = given.experiment.resolve().parent, given.overrides
    if code_of(folder) is None:  # else it is one of --now
        folder, more = of_this_job(given), []
    code = code_of(folder)
    if code is None:
        raise UserError(f"{folder} was removed while the job started; submit it again")
    what = ["--stages", *stages] if stages else [module.removeprefix("jobs.")]
    shard = ["--shard", given.shard] if given.shard else []
    print("\n".join([str(code), "-u", str(code / snapshot.RUN_JOB), *what, str((folder / EXPERIMENT).resolve()), *more, *shard]))
    return 0


if __name__ == "__main__":
    sys.exit(launch.guarded(main))
