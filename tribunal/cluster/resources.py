"""What a job asks of SLURM: the experiment's ``slurm`` block over the job's own needs, checked before anything is queued."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.site import profile, site_value
from tribunal.core.config import Experiment
from tribunal.core.errors import ConfigError

SLACK_S = 90
"""A signal comes up to 60 s early and the limit is met on a 30 s grid: a shorter run would be told to stop at once."""

OURS = {
    "signal": "set by slurm.signal_lead_s",
    "array": "set by slurm.array",
    "job-name": "set by submit",
    "dependency": "set by submit from each job's needs",
    "output": "set by submit",
    "error": "set by submit",
    "open-mode": "always append",
    "wrap": "the script is submit's",
    "parsable": "submit reads the answer itself",
    "ntasks": "follows from slurm.gpus",
    "ntasks-per-node": "follows from slurm.gpus",
    "time": "set slurm.time",
}


@dataclass(frozen=True)
class Resources:
    """One job's request; gpus and mem_gb are per node, cpus per task."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    limit_s: int
    nodes: int
    gpus: int
    cpus: int
    mem_gb: int
    exclude: str | None
    mail: str | None
    tasks_per_node: int
    array: int
    split: bool
    throttle: int | None
    extra: tuple[str, ...]
    lead_s: int

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def shards(self) -> int:
        """Parts of the plan: one per task of each array element, where the job can be split."""
        return self.array * self.tasks if self.split else 1

    @property
    def shards_each(self) -> int:
        """Shards of one array element."""
        return self.tasks if self.split else 1

    @property
    def minutes(self) -> int:
        return -(-self.limit_s // 60)


def resolve(job: Job[Any]) -> Resources:
    """The job's resources: ``slurm.jobs.<job>``, then ``slurm``, then the site file, then the job's own.

    A job that needs no GPU by itself (labels, probes, reports) gets none, and one node, unless ``slurm.jobs.<job>`` says so.

    Raises:
        ConfigError: one line that names file, field, value and cure.
    """
    experiment, slurm = job.experiment, job.experiment.slurm
    special = slurm.jobs.get(job.name)
    own = job.resources
    cpu_only = own.gpus == 0

    def value(field: str, default: Any = None, *, general: bool = True) -> Any:
        sources = [special, slurm if general else None, own]
        return next((found for source in sources if source is not None and (found := getattr(source, field)) is not None), default)

    gpus = value("gpus", 1, general=not cpu_only)
    nodes = value("nodes", 1, general=not cpu_only)
    where = f"{experiment.path}: slurm" + (f" ({job.name})" if special else "")
    time = value("time", "4:00:00")
    limit_s = parse_limit(str(time), where)
    lead_s = lead(experiment)
    if limit_s < lead_s + SLACK_S:
        raise ConfigError(
            f"{where}.time: {time} is shorter than signal_lead_s + {SLACK_S} s ({lead_s} + {SLACK_S} s), so the job would be told to "
            f"stop as it starts; ask for at least {_clock(lead_s + SLACK_S)} or a shorter lead"
        )
    extra = tuple(value("extra") or ())
    check_extra(extra, where)
    many = job.shards or job.distributed
    one_process = experiment.model.device_map is not None
    return Resources(
        partition=value("partition") or site_value("TRIBUNAL_SLURM_PARTITION"),
        account=value("account") or site_value("TRIBUNAL_SLURM_ACCOUNT"),
        qos=value("qos") or site_value("TRIBUNAL_SLURM_QOS"),
        constraint=value("constraint", general=gpus > 0),
        gres=value("gres") if gpus else None,
        limit_s=limit_s,
        nodes=nodes,
        gpus=gpus,
        cpus=value("cpus", 1),
        mem_gb=value("mem_gb", 4),
        exclude=value("exclude"),
        mail=value("mail"),
        tasks_per_node=gpus if gpus > 1 and many and not one_process else 1,
        array=(value("array") or 1) if job.shards else 1,
        split=job.shards,
        throttle=value("array_throttle"),
        extra=extra,
        lead_s=lead_s,
    )


def lead(experiment: Experiment) -> int:
    """Seconds of warning: the experiment's own where it says so, else the one that doctor found this site to need."""
    slurm = experiment.slurm
    measured = profile().get("signal_lead_s")
    return int(measured) if measured and "signal_lead_s" not in slurm.model_fields_set else slurm.signal_lead_s


def parse_limit(text: str, where: str) -> int:
    """Seconds of a SLURM time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none of these, or zero.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if match is None:
        raise ConfigError(f'{where}.time: {text!r} is no time limit; give it as "4:00:00", "1-12:00:00" or minutes, in quotes')
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        scales: tuple[int, ...] = (3600, 60, 1)
    else:
        scales = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    seconds = int(days or 0) * 86400 + sum(n * s for n, s in zip(numbers, scales))
    if seconds <= 0 or any(number > 59 for number in numbers[1:]):
        raise ConfigError(f"{where}.time: {text!r} is no time limit; minutes and seconds go to 59 and the whole is above zero")
    return seconds


def check_extra(extra: Sequence[str], where: str) -> None:
    """Refuse an option that submit sets itself, and anything that is not ``--option[=value]``."""
    for option in extra:
        match = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", option)
        if match is None:
            raise ConfigError(f"{where}.extra: {option!r} is no sbatch option; write it as --option=value")
        if match[1] in OURS:
            raise ConfigError(f"{where}.extra: {option!r}: --{match[1]} is {OURS[match[1]]}; remove it from extra")


def _clock(seconds: int) -> str:
    minutes = -(-seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d}:00"
