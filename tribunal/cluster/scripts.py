"""The batch scripts of a submission, written and queued through submitit.

submitit writes the scripts, submits them and reads the ids back. What it starts is ours: ``run_job.py`` of the code snapshot, the
same program as by hand. Nothing is pickled, so signals are noted before anything heavy is imported, no class layout
has to survive the queue, and an array of 10,000 tasks needs one script instead of 10,000 pickles.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tribunal.cluster import queue, snapshot
from tribunal.cluster.job import root
from tribunal.cluster.plan import Planned
from tribunal.cluster.prefetch import OFFLINE
from tribunal.cluster.site import profile, site_environment, site_value
from tribunal.cluster.slurm import shard_argument, step_shell
from tribunal.core.errors import UserError
from tribunal.core.storage import make_folder, write_atomic


def chunks(planned: Planned, largest: int) -> list[tuple[int, list[int]]]:
    """(offset, array indices below ``largest``) of each sbatch call; the shard is index + offset."""
    groups: dict[int, list[int]] = {}
    for index in planned.indices:
        groups.setdefault(index // largest, []).append(index % largest)
    return [(group * largest, indices) for group, indices in sorted(groups.items())]


def index_list(indices: Sequence[int]) -> str:
    """The shortest form that sbatch reads: 0-7,9."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def start_command(planned: Planned, code: Path, experiment_file: Path) -> list[str]:
    """The command that runs one generation of a job."""
    return [sys.executable, "-u", str(code / snapshot.RUN_JOB), planned.job.name, str(experiment_file), *planned.overrides]


def environment(code: Path, record: Path) -> dict[str, str]:
    """What every generation finds in its environment, wherever it runs."""
    site = {key: value for key, value in site_environment().items() if key.startswith(("HF_", "TORCH_HOME", "TRITON_"))}
    return {
        **site,
        **OFFLINE,
        "TRIBUNAL_ROOT": str(root().resolve()),
        "TRIBUNAL_SUBMISSION": str(record),
        **({"TRIBUNAL_DRILL": os.environ["TRIBUNAL_DRILL"]} if "TRIBUNAL_DRILL" in os.environ else {}),
        "PYTHONPATH": os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


class Sbatch:
    """One sbatch call: submitit's script around our command.

    Args:
        folder: the submission's folder; script and logs go below it.
        part: counts the arrays of a job that has more tasks than ``MaxArraySize``.
        array: the array indices; None for a single job.
        offset: added to the array index to get the shard.
    """

    def __init__(
        self, planned: Planned, folder: Path, code: Path, *, part: int = 0, array: Sequence[int] | None = None, offset: int = 0
    ) -> None:
        self.planned = planned
        self.folder = folder
        self.code = code
        self.array = array
        self.offset = offset
        job = planned.job
        self.name = f"{job.experiment.name}.{job.name}"
        self.script = folder / (f"{job.name}.sbatch" if part == 0 else f"{job.name}-{part + 1}.sbatch")
        self.logs = folder / "logs" / job.name

    def text(self) -> str:
        """The script."""
        command = start_command(self.planned, self.code, self.folder / "experiment.yaml")
        text: str = _executor(self)._make_submission_file_text(shlex.join(command), "")
        return text

    def shard(self) -> str:
        """The step's argument that says which shard a task works on; empty where the job is not split."""
        asked = self.planned.resources
        if asked.shards == 1:
            return ""
        element = "SLURM_ARRAY_TASK_ID" + (f" + {self.offset}" if self.offset else "") if self.array is not None else "0"
        first = element if asked.shards_each == 1 else f"({element}) * {asked.shards_each}"
        return shard_argument(first, asked.shards_each, asked.shards)

    def submit(self, dependency: Sequence[str], known: Sequence[str] = ()) -> str:
        """Write and queue the script; returns the job's id.

        Args:
            dependency: ids to wait for.
            known: ids of earlier submissions of this very script.

        Raises:
            UserError: sbatch refused, with its reason.
        """
        write_atomic(self.script, self.text())
        make_folder(self.logs)
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = _executor(self)
        executor.dependency = list(dependency)
        try:
            job_id: str = executor._submit_command("").job_id
            return job_id
        except (FailedJobError, FailedSubmissionError) as error:
            accepted = queue.find_script(self.name, self.script, known=known)  # an answer that got lost is no refusal
            if accepted is None:
                raise UserError(f"sbatch refused {self.planned.job.name}: {queue.reason(str(error))}; script: {self.script}") from None
            return accepted
        finally:
            for copy in [*self.logs.glob(".submission_file_*"), *self.logs.glob("*_submission.sh")]:
                copy.unlink()  # submitit's; ours is beside the record

    def parameters(self) -> dict[str, Any]:
        """submitit's parameters for this job."""
        asked = self.planned.resources
        more: dict[str, Any] = {"signal": f"USR1@{asked.lead_s}", "requeue": True}
        for option in asked.extra:
            key, _, value = option.removeprefix("--").partition("=")
            more[key] = value or True
        if profile().get("route", "requeue") != "requeue":
            more["no-requeue"] = True  # it would be refused: a fresh sbatch, or the next of the chain, goes on
        if "no-requeue" in more:
            del more["requeue"]
        if self.array is not None:
            throttle = f"%{asked.throttle}" if asked.throttle else ""
            more["array"] = index_list(self.array) + throttle
        gres = asked.gres or "gpu"
        asks = {
            "job_name": self.name,
            "time": asked.minutes,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus,
            "mem": f"{asked.mem_gb}GB",
            "gres": f"{gres}:{asked.gpus}" if asked.gpus else None,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "exclude": asked.exclude,
            "mail_user": asked.mail,
            "mail_type": "END,FAIL" if asked.mail else None,
        }
        return {key: value for key, value in asks.items() if value is not None} | {
            "stderr_to_stdout": True,
            "wckey": None,
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus}", "bash", "-c", step_shell(self.shard()), "tribunal"],
            "setup": self._setup(),
            "additional_parameters": more,
        }

    def _setup(self) -> list[str]:
        modules = site_value("TRIBUNAL_MODULES")
        lines = [f"module load {modules}"] if modules else []
        values = environment(self.code, self.folder)
        lines += [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
        return lines


def _executor(sbatch: Sbatch) -> Any:
    """submitit's SlurmExecutor with our command and our script's name (imported late: it takes half a second)."""
    from submitit.slurm import slurm

    class Executor(slurm.SlurmExecutor):
        dependency: list[str] = []

        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no SLURM

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            submission_file_path.write_text(sbatch.script.read_text())
            wait = [f"--dependency=afterany:{':'.join(self.dependency)}"] if self.dependency else []
            return ["sbatch", *wait, str(sbatch.script)]

    executor = Executor(folder=sbatch.logs)
    parameters = sbatch.parameters()
    executor.parameters = {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}
    if sbatch.array is not None:
        executor.parameters["map_count"] = len(sbatch.array)
    return executor


def sbatches(planned: Planned, folder: Path, code: Path) -> list[Sbatch]:
    """The sbatch calls of one job: one, or several where it has more tasks than the site's arrays may have."""
    if not planned.array:
        return [Sbatch(planned, folder, code)]
    parts = chunks(planned, queue.max_array_size())
    return [Sbatch(planned, folder, code, part=part, array=indices, offset=offset) for part, (offset, indices) in enumerate(parts)]
