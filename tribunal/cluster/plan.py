"""Decide what to submit for an experiment, and refuse what cannot work, before anything is queued."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tribunal.cluster import queue
from tribunal.cluster.job import Job, root
from tribunal.cluster.launch import job_kind, make_job
from tribunal.cluster.pipelines import finished, selected
from tribunal.cluster.publishing import STARTED, compare, probe_write, started_otherwise, untouched
from tribunal.cluster.resources import Resources, parse_limit, resolve
from tribunal.core.config import Experiment
from tribunal.core.errors import ConfigError, UserError
from tribunal.core.storage import make_folder, read_json


@dataclass(frozen=True)
class Planned:
    """One job to submit.

    Attributes:
        indices: the array elements to run, of ``resources.array``.
        parents: jobs of this plan that it waits for.
        after: ids, submitted earlier, that it waits for as well.
        overrides: on top of the submitted experiment.
    """

    job: Job[Any]
    resources: Resources
    indices: tuple[int, ...]
    parents: tuple[str, ...]
    after: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def array(self) -> bool:
        return self.resources.array > 1


@dataclass
class Plan:
    """What a submission will do.

    Attributes:
        skipped: (job, why nothing is submitted for it).
    """

    experiment: Experiment
    jobs: list[Planned] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def make_plan(experiment: Experiment, names: Sequence[str], queued: Mapping[str, Mapping[int | None, str]]) -> Plan:
    """Decide what to submit, and refuse what cannot work, before anything is queued.

    Args:
        names: jobs and pipelines.
        queued: ids of what is queued or running already, by job and shard (None: all of it).
    Raises:
        UserError: one line that names what is wrong and what to do.
    """
    plan = Plan(experiment)
    for name in sorted(selected(names, experiment), key=_depth):
        job = make_job(name, experiment)
        coming = [planned.job.name for planned in plan.jobs]
        waits = tuple(dict.fromkeys([*coming, *(other for other in queued if other != name)])) if job.reads_all else job.needs
        if finished(job) and not (job.reads_all and waits):
            plan.skipped.append((name, "finished before"))
            continue
        resources = resolve(job)
        live = queued.get(name, {})
        left = {shard // resources.shards_each for shard in unfinished(job, resources.shards) if shard not in live and None not in live}
        indices = tuple(sorted(left))
        if not indices:
            why = f"queued already as {', '.join(sorted(set(live.values())))}" if live else "its shards are complete"
            plan.skipped.append((name, why))
            continue
        _refuse_changed(job)
        job.check()
        after = []
        for needed in waits:
            if needed in coming or (not job.reads_all and finished(make_job(needed, experiment))):
                continue
            if not queued.get(needed):
                raise UserError(
                    f"{name} reads the results of {needed}, which has neither finished nor is queued for experiment "
                    f"'{experiment.name}'; submit it as well: tribunal submit {experiment.path} {needed} {name}"
                )
            after += sorted(set(queued[needed].values()))
        overrides = (f"{name}.after=[{','.join(waits)}]",) if job.reads_all else ()
        plan.jobs.append(Planned(job, resources, indices, tuple(need for need in waits if need in coming), tuple(after), overrides))
    return plan


def unfinished(job: Job[Any], shards: int) -> list[int]:
    """Shards without a marker that says that all their units are durable."""
    markers = {path.name for path in (job.state / "finished").glob("*.json")}
    left = [index for index in range(shards) if f"{index}-of-{shards}.json" not in markers]
    return left or [shards - 1]  # all complete but not published: one of them publishes


def check_site(plan: Plan) -> None:
    """Ask the controller whether partition, limit and account exist, and try the places where results go.

    Raises:
        ConfigError: one line per first fault, with what this site offers.
    """
    where = f"{plan.experiment.path}: slurm"
    partitions = queue.partitions()
    for planned in plan.jobs:
        asked = planned.resources.partition
        if asked is None or not partitions:
            continue
        for name in asked.split(","):
            if name not in partitions:
                raise ConfigError(
                    f"{where}.partition: {planned.job.name}: no partition '{name}' here; known: {', '.join(sorted(partitions))}"
                )
        limits = [partitions[name] for name in asked.split(",")]
        longest = max((parse_limit(limit, where) if limit != "infinite" else float("inf") for limit in limits), default=0)
        if planned.resources.limit_s > longest:
            raise ConfigError(
                f"{where}.time: {planned.job.name}: {planned.resources.limit_s // 60} minutes is more than partition '{asked}' allows "
                f"({', '.join(limits)}); ask for less: the job goes on in as many generations as it takes"
            )


def check_folders(experiment: Experiment) -> None:
    """Refuse now where results could not be written later."""
    for kind in ("checkpoints", "results"):
        probe_write(make_folder(root() / kind / experiment.name))


def _refuse_changed(job: Job[Any]) -> None:
    """Refuse a configuration that the job would refuse on its first start (inputs that are still to come left out)."""
    path = job.state / STARTED
    if job.reads_all or not path.exists():
        return
    mine, theirs = job.fingerprint(), read_json(path)
    coming = {name for name, digest in mine["inputs"].items() if digest is None}
    theirs["inputs"] = {name: None if name in coming else digest for name, digest in theirs.get("inputs", {}).items()}
    if (differences := compare(theirs, mine)) and not untouched(job):
        raise started_otherwise(job, differences)


def _depth(name: str) -> tuple[int, str]:
    """Longest way down the graph of needs, so that parents come first; what reads all comes last."""

    def depth(job: str) -> int:
        if job_kind(job).reads_all:
            return sys.maxsize
        return 1 + max((depth(need) for need in job_kind(job).needs), default=0)

    return depth(name), name
