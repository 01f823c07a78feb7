"""Continuation: the only place that asks SLURM to run a job again.

Same id where possible (``scontrol requeue``); where requeueing is refused, a fresh ``sbatch`` of the same command; where
neither can be reached, the command to type. What is about to be asked is written down first, so that of all processes of a
start one alone asks, and a submission whose answer was lost is found again instead of being repeated.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from tribunal.cluster import slurm
from tribunal.cluster.job import Job
from tribunal.cluster.ranks import Meeting
from tribunal.cluster.slurm import JobFacts, SlurmError, Start
from tribunal.core.storage import sha256_json, write_atomic, write_json

RETRY_S = 60.0
"""How long a controller that does not answer is asked again, where the end of the job leaves as long."""
FOR_GOOD = ("disabled", "permission", "not permitted", "Invalid", "limit", "Access", "denied", "not available")
"""Words of a refusal that another try will not change."""


class Outcome(NamedTuple):
    """``next``: ``requeue``, ``sbatch``, ``by hand``, or ``nothing`` (another process asks)."""

    next: str
    why: str
    continuation: str | None = None


class Continuation:
    """One start's resubmission.

    Args:
        command: what the job runs, as typed: repeated by a fresh submission.
        until: when the attempts have to end (seconds since the epoch).
    """

    def __init__(self, job: Job, start: Start, command: Sequence[str], *, until: float) -> None:
        self.job = job
        self.start = start
        self.command = _without_shard(command)
        self.until = until
        self.meeting = Meeting(job.state, start)
        key = sha256_json({"owner": job.owner, "state": str(job.state), "shard": str(job.shard), "start": start.name})
        self.comment = f"tribunal:{key[:16]}"

    def go_on(self, facts: JobFacts | None, *, delay_s: int = 0) -> Outcome:
        """Have the job run again, once.

        Args:
            facts: what the controller said of this job; None where it said nothing.
            delay_s: not before so many seconds from now.
        """
        intent = {"start": self.start.name, "comment": self.comment, "command": self.command}
        record = self.meeting.claim(intent)
        if record is None:
            return Outcome("nothing", "another process of this start resubmits")
        outcome = self._requeue(facts, delay_s) or self._submit(facts, delay_s)
        write_json(record, {**intent, **outcome._asdict()})
        return outcome

    # the same id -----------------------------------------------------------------------------------------------------

    def _requeue(self, facts: JobFacts | None, delay_s: int) -> Outcome | None:
        """None where SLURM will not do it."""
        if facts is not None and facts.restarts > self.start.restarts:
            return Outcome("requeue", "the controller has requeued it itself", self.start.task)
        if facts is not None and facts.values.get("Requeue") == "0":
            return None

        def ask() -> Outcome:
            command = f"scontrol requeue {self.start.task}"
            if delay_s:  # in one go: the requeue ends this process within seconds
                later = f"scontrol update JobId={self.start.task} StartTime=now+{delay_s}"
                command += f" && {{ {later} || {{ sleep 1; {later}; }}; }}"
            try:
                slurm.require("scontrol")
                slurm.call(["/bin/sh", "-c", command])
            except SlurmError:
                if not self._was_requeued():
                    raise
            return Outcome("requeue", f"job {self.start.task} requeued", self.start.task)

        return self._try(ask)

    def _was_requeued(self) -> bool:
        try:
            facts = slurm.ask(self.start.job)
        except SlurmError:
            return False
        return facts.restarts > self.start.restarts or facts.state == "PENDING"

    # a new id --------------------------------------------------------------------------------------------------------

    def _submit(self, facts: JobFacts | None, delay_s: int) -> Outcome:
        script = self.job.state / script_name(self.shards(), self.job.shard.count)
        write_atomic(script, self.script(facts))
        environment = slurm.clean_environment()
        asked = False

        def ask() -> Outcome:
            nonlocal asked
            if asked and (found := slurm.find(self.comment)):
                return self._moved(found[0])
            asked = True
            begin = [f"--begin=now+{delay_s}"] if delay_s else []
            try:
                answer = slurm.call(["sbatch", "--parsable", *begin, str(script)], env=environment)
            except SlurmError:
                if found := slurm.find(self.comment):
                    return self._moved(found[0])
                raise
            return self._moved(answer.strip().partition(";")[0])

        outcome = self._try(ask)
        if outcome is not None:
            return outcome
        return Outcome("by hand", f"neither scontrol nor sbatch could be used from this node; to go on: sbatch {shlex.quote(str(script))}")

    def _moved(self, new: str) -> Outcome:
        """Let what waits for this job wait for its continuation as well."""
        try:
            waiting = slurm.dependents(self.start)
            for child, dependency in waiting.items():
                slurm.call(["scontrol", "update", f"JobId={child}", f"Dependency={dependency},afterany:{new}"])
        except SlurmError as error:
            print(f"{self.job.name}: jobs that wait for {self.start.task} could not be told of {new} ({error}); they wait by themselves")
        return Outcome("sbatch", f"continues as job {new}", new)

    def script(self, facts: JobFacts | None) -> str:
        """The continuation's batch script: this job's own options, from the controller or else from the environment."""
        options = [*_options(facts, self.job), f"--comment={self.comment}", "--open-mode=append"]
        options += [f"--signal=USR1@{self.job.experiment.slurm.signal_lead_s}"]
        header = "\n".join(f"#SBATCH {option}" for option in options)
        mine, count = self.shards(), self.job.shard.count
        shard = slurm.shard_argument(str(mine[0]), len(mine), count) if count > 1 else ""
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        step = ["srun", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
        step += ["bash", "-c", slurm.step_shell(shard), "tribunal", *self.command]
        return f"#!/bin/bash\n{header}\ncd {shlex.quote(str(Path.cwd()))} || exit 1\nexec {shlex.join(step)}\n"

    def shards(self) -> range:
        """What this start works on: each task of a job that is split has the next shard."""
        tasks = self.start.ranks if self.job.shards else 1
        first = self.job.shard.index - (self.start.rank if tasks > 1 else 0)
        return range(first, first + tasks)

    def _try(self, ask: Callable[[], Outcome]) -> Outcome | None:
        """Ask until there is an answer: again after a failure that may pass, with growing pauses; None when it is final."""
        pause = 0.5
        while True:
            try:
                return ask()
            except SlurmError as error:
                final = error.missing or any(word in str(error) for word in FOR_GOOD)
                print(f"{datetime.now():%H:%M:%S} {self.job.name}: {error}", flush=True)
                if final or time.time() + pause > self.until:
                    return None
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def script_name(shards: range, count: int) -> str:
    """The continuation's file in the job's state; ``shards_of_script`` reads it back."""
    last = f"-{shards[-1]}" if len(shards) > 1 else ""
    return f"continue-{shards[0]}{last}-of-{count}.sbatch"


def shards_of_script(script: str) -> list[int | None] | None:
    """The shards that a continuation works on, from its path ([None]: a job that is not split); None for any other script."""
    match = re.fullmatch(r"continue-(\d+)(?:-(\d+))?-of-(\d+)\.sbatch", Path(script).name)
    if match is None:
        return None
    return [None] if int(match[3]) == 1 else list(range(int(match[1]), int(match[2] or match[1]) + 1))


def _without_shard(command: Sequence[str]) -> list[str]:
    """The command without its ``--shard``, which holds for one task alone."""
    pairs = zip(["", *command], command)
    return [word for before, word in pairs if before != "--shard" and not re.match(r"--shard(=|$)", word)]


def _options(facts: JobFacts | None, job: Job) -> list[str]:
    env = os.environ
    options = [f"--job-name={env.get('SLURM_JOB_NAME', job.name)}"]
    if tasks := env.get("SLURM_NTASKS"):
        options.append(f"--ntasks={tasks}")
    if each := env.get("SLURM_NTASKS_PER_NODE"):
        options.append(f"--ntasks-per-node={each}")
    if cpus := env.get("SLURM_CPUS_PER_TASK"):
        options.append(f"--cpus-per-task={cpus}")
    if facts is None:
        time_limit = job.experiment.slurm.jobs.get(job.name, job.experiment.slurm).time or job.experiment.slurm.time or job.resources.time
        plain = {
            "partition": env.get("SLURM_JOB_PARTITION"),
            "account": env.get("SLURM_JOB_ACCOUNT"),
            "qos": env.get("SLURM_JOB_QOS"),
            "nodes": env.get("SLURM_JOB_NUM_NODES"),
            "time": time_limit,
            "mem": env.get("SLURM_MEM_PER_NODE"),
            "gpus-per-node": env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE"),
        }
        return [*options, *(f"--{name}={value}" for name, value in plain.items() if value)]
    keys = {
        "partition": "Partition",
        "account": "Account",
        "qos": "QOS",
        "time": "TimeLimit",
        "nodes": "NumNodes",
        "constraint": "Features",
        "nodelist": "ReqNodeList",
        "exclude": "ExcNodeList",
        "reservation": "Reservation",
        "output": "StdOut",
        "error": "StdErr",
    }
    options += [f"--{name}={value}" for name, key in keys.items() if (value := facts.given(key))]
    for key, name in (("MinMemoryNode", "mem"), ("MinMemoryCPU", "mem-per-cpu")):
        if (value := facts.given(key)) and value != "0":
            options.append(f"--{name}={value}")
    for key, name in (("TresPerNode", "gpus-per-node"), ("TresPerTask", "gpus-per-task"), ("TresPerJob", "gpus")):
        if value := facts.given(key):  # gres:gpu:a100:2 or gres/gpu:2
            options.append(f"--{name}={value.replace('/', ':').removeprefix('gres:').removeprefix('gpu:')}")
    if facts.values.get("Requeue") == "0":
        options.append("--no-requeue")
    if facts.values.get("OverSubscribe") == "NO":
        options.append("--exclusive")
    return options
