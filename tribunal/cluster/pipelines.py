"""Named lists of jobs, in the order in which they read each other's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tribunal.cluster.job import Job
from tribunal.cluster.launch import job_kind, make_job, run
from tribunal.cluster.publishing import already_finished
from tribunal.core import registry
from tribunal.core.config import Experiment
from tribunal.core.errors import ConfigError

CALIBRATE = ("generate_traces", "label_traces", "extract_activations", "train_probes")
CROSS_EXAMINE = ("monitor_traces", "steer", "select_answers", "attribute_direction", "transfer_probes")
ORACLE = ("label_sentences", "train_oracle", "evaluate_oracle")
PIPELINES: dict[str, tuple[str, ...]] = {
    "calibrate": CALIBRATE,
    "cross_examine": (*CROSS_EXAMINE, "report"),
    "oracle": (*ORACLE, "report"),
    "trial": (*CALIBRATE, *CROSS_EXAMINE, *ORACLE, "report"),
}


def jobs_of(name: str) -> tuple[str, ...]:
    """The jobs of a pipeline, or the one job of that name.

    Raises:
        ConfigError: neither a pipeline nor a job; names the nearest.
    """
    if name in PIPELINES:
        return PIPELINES[name]
    jobs = registry.names("jobs")
    if name not in jobs:
        raise ConfigError(f"unknown pipeline or job '{name}'; {registry.nearest(name, [*PIPELINES, *jobs])}")
    return (name,)


def selected(words: Sequence[str], experiment: Experiment) -> tuple[str, ...]:
    """The jobs that names of pipelines and jobs stand for; of a pipeline, an ``only_if_read`` one where another reads it.

    Raises:
        ConfigError: a word is neither a pipeline nor a job.
    """
    names = list(dict.fromkeys(name for word in words for name in jobs_of(word)))
    read = {need for name in names for need in make_job(name, experiment).needs}
    return tuple(name for name in names if name in read or name in words or not job_kind(name).only_if_read)


def run_pipeline(names: Sequence[str], experiment: Experiment) -> int:
    """Run jobs one after the other in this process; returns the first exit code that is not 0.

    Every job's input is checked before the first one starts: that it is there, or will be, first.
    """
    for name in names:
        job = make_job(name, experiment)
        for needed, digest in job.inputs().items():
            if digest is None and needed not in names:
                job.results_of(needed)  # says what is missing
        if not finished(job):
            job.check()
    for name in names:
        if code := run(make_job(name, experiment)):
            return code
    return 0


def finished(job: Job[Any]) -> bool:
    """``already_finished``, where what the job reads is there to be compared."""
    return None not in job.fingerprint()["inputs"].values() and already_finished(job)
