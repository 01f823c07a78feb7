"""What a running job asks SLURM's controller for: its own state and end time, a requeue, a fresh submission.

Every client runs with the stop signals blocked from before it exists: SLURM sends those to every process of the step, and
a requeue that dies of the signal it answers is how continuations get lost.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CALL_TIMEOUT_S = 30.0
_DEAF_TO = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class SlurmError(Exception):
    """A client failed, timed out or is not there; ``missing`` says which of the last."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


def call(command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = CALL_TIMEOUT_S) -> str:
    """Run a SLURM client and return its output.

    Raises:
        SlurmError: with the last line of what it said.
    """
    require(command[0])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    try:  # the mask is inherited; ours is lifted at once, and what came meanwhile is then noted
        pipe = subprocess.PIPE
        client = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        output, errors = client.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        client.kill()
        client.communicate()
        raise SlurmError(f"{command[0]} gave no answer in {timeout_s:.0f} s") from None
    if client.returncode != 0:
        said = (errors.strip() or output.strip() or "nothing said").splitlines()[-1]
        raise SlurmError(f"{command[0]}: {said} (exit code {client.returncode})")
    return output


def require(program: str) -> None:
    """Raises SlurmError (``missing``) where a client is not on this node's PATH."""
    if shutil.which(program) is None:
        raise SlurmError(f"{program} is not on this node's PATH", missing=True)


@dataclass(frozen=True)
class Start:
    """Which start of which SLURM job this process belongs to.

    Attributes:
        job: ``SLURM_JOB_ID``, unique for an array's task as well.
        task: the id to name in commands: ``ARRAY_TASK`` for an array's task, since the plain id of an array's last
            task means the whole array.
        restarts: ``SLURM_RESTART_COUNT``.
        rank, ranks: this task of the step, and how many there are.
    """

    job: str
    task: str
    restarts: int
    rank: int
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.job}.{self.restarts}"


def this_start(env: Mapping[str, str] = os.environ) -> Start | None:
    """None outside SLURM."""
    job = env.get("SLURM_JOB_ID")
    if not job:
        return None
    array = env.get("SLURM_ARRAY_JOB_ID")
    task = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else job
    # without a step (the batch script itself) the counts are the allocation's, not of processes that run
    in_step = "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env
    ranks = int(env["SLURM_STEP_NUM_TASKS"]) if in_step else 1
    return Start(job, task, int(env.get("SLURM_RESTART_COUNT", "0")), int(env["SLURM_PROCID"]) if in_step else 0, ranks)


def own_devices(env: Mapping[str, str] = os.environ) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` of this task alone, where SLURM shows the GPUs of all of a node's tasks to each of them (``--gres``).

    None where there is nothing to part: one task, one GPU, or a number of GPUs that the node's tasks cannot share equally.
    """
    visible = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    per_node = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, nodes in per_node for _ in range(int(nodes or 1))]
    node = int(env.get("SLURM_NODEID", "0"))
    if not node < len(tasks) or tasks[node] < 2 or len(visible) < 2 or len(visible) % tasks[node]:
        return None
    each, place = len(visible) // tasks[node], int(env["SLURM_LOCALID"])
    return ",".join(visible[place * each : (place + 1) * each])


@dataclass(frozen=True)
class JobFacts:
    """One answer of ``scontrol show job``."""

    values: Mapping[str, str]

    @property
    def state(self) -> str:
        return self.values["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.values.get("Restarts", "0"))

    @property
    def end(self) -> float | None:
        """When the controller ends it (limit, or the end of the grace time); seconds since the epoch."""
        return _time(self.values.get("EndTime"))

    @property
    def preempted(self) -> bool:
        return _time(self.values.get("PreemptTime")) is not None or self.state == "PREEMPTED"

    @property
    def timed_out(self) -> bool:
        start, end, limit = _time(self.values.get("StartTime")), self.end, _seconds(self.values.get("TimeLimit"))
        over = start is not None and end is not None and limit is not None and end - start >= limit
        return self.state == "TIMEOUT" or (self.state == "COMPLETING" and over)

    def given(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value in (None, "", "(null)", "N/A", "None") else value


def ask(job: str, *, timeout_s: float = CALL_TIMEOUT_S) -> JobFacts:
    """What the controller says of a job.

    Raises:
        SlurmError: no answer, or it has forgotten the job.
    """
    said = call(["scontrol", "show", "job", "-o", job], timeout_s=timeout_s)
    values = dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:.]*)=(\S*)", said.splitlines()[0] if said else ""))
    if "JobState" not in values:
        raise SlurmError(f"scontrol show job {job}: no JobState in its answer")
    return JobFacts(values)


def find(comment: str) -> list[str]:
    """Ids of the queued and running jobs whose comment holds this word."""
    lines = call(["squeue", "-h", "-r", "-o", "%i %k"]).splitlines()
    return [line.split()[0] for line in lines if comment in line.split()[1:]]


def dependents(start: Start) -> dict[str, str]:
    """Waiting jobs that name this start's job in their dependency, with that dependency as sbatch takes it."""
    ids = {start.job, start.task, start.task.partition("_")[0]}
    found = {}
    for line in call(["squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %E"]).splitlines():
        child, _, text = line.partition(" ")
        plain = re.sub(r"\([^)]*\)", "", text.strip()).replace("_*", "")
        if "?" not in plain and ids & set(re.findall(r"[\d_]+", plain)):
            found[child] = plain
    return found


def step_shell(shard: str = "") -> str:
    """What ``bash -c`` does in each task of a step, with the command as its arguments.

    USR1 is ignored until Python's handlers stand: its default action would end an interpreter that is starting.
    """
    return f'trap "" USR1; exec "$@"{shard}'


def shard_argument(first: str, tasks: int, of: int) -> str:
    """The argument that says which shard a task works on, worked out by the shell of each task of a step.

    Args:
        first: the shard of the step's task 0: a number, or shell arithmetic.
        tasks: tasks of the step, on consecutive shards.
        of: shards in all.
    """
    index = first if tasks == 1 else f"{first} + SLURM_PROCID"
    return f' --shard "$(({index}))/{of}"'


def clean_environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a fresh submission may inherit: nothing that describes this job, but the way to the controller."""
    drop = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SUBMITIT_")
    names = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ENVIRONMENT", "RANK", "LOCAL_RANK"}
    names |= {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in env.items() if key == "SLURM_CONF" or (not key.startswith(drop) and key not in names)}


def _time(text: str | None) -> float | None:
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None  # Unknown, None, N/A


def _seconds(text: str | None) -> int | None:
    """``[D-]HH:MM:SS`` as the controller prints it."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
