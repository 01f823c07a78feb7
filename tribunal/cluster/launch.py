"""Run one job in the foreground: start or resume it, stop and save on a signal, publish when all its units are there.

    python -m jobs.<job> EXPERIMENT.yaml [section.key=value ...] [--shard I/N] [--limit N]

Exit codes: 0 finished (the receipt is written), 75 saved and to be continued, 2 something the user can mend, 1 a fault.
Nothing here, and nothing that a job's module imports at its top, needs torch: a finished job is recognised at once
and signals are noted before any heavy import.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.cluster import preemption
from tribunal.cluster.budget import units_set_aside
from tribunal.cluster.job import Job, Shard
from tribunal.cluster.lease import Lease, LeaseHeld
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.preemption import StopSignal
from tribunal.cluster.progress import ProgressDisplay
from tribunal.cluster.publishing import already_finished, claim_state, publish, require_unchanged, shards_to_come
from tribunal.cluster.ranks import Meeting
from tribunal.cluster.site import use_site_values
from tribunal.cluster.slurm import Start, this_start
from tribunal.core import registry
from tribunal.core.config import Experiment, load_experiment
from tribunal.core.errors import ConfigError, StorageError, UserError
from tribunal.core.storage import make_folder, saving, write_json
from tribunal.core.work import Json

FINISHED, CONTINUE = 0, 75


def main(job: str, argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m jobs.<job>``."""
    preemption.install()
    args = arguments(f"python -m jobs.{job}").parse_intermixed_args(argv)

    def body() -> int:
        use_site_values()
        experiment = open_experiment(args.experiment, args.overrides, args.limit)
        shard = parse_shard(args.shard) if args.shard else None
        start = this_start()
        if start is None and "TRIBUNAL_GENERATION" in os.environ:
            from tribunal.cluster.local import run_generation

            return run_generation(make_job(job, experiment, shard))
        if start is None:
            return run_job(job, experiment, shard)
        from tribunal.cluster.supervision import supervise  # it needs this module

        command = [sys.executable, *sys.orig_argv[1:]]  # as it was started: -m in a checkout, or a snapshot's file
        made = make_job(job, experiment, shard)
        if shard is None and made.shards:
            made = make_job(job, experiment, shard_of_task(start))
        return supervise(made, command)

    sys.exit(guarded(body))


def arguments(program: str) -> argparse.ArgumentParser:
    """What every job takes on its command line."""
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("experiment", type=Path, help="the experiment file, e.g. experiments/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes on top of the file")
    parser.add_argument("--shard", metavar="I/N", help="work on shard I of N (0-based); in SLURM by default the array's task")
    parser.add_argument("--limit", type=int, metavar="N", help="smoke run: the first N problems, under a name of its own")
    return parser


def guarded(run: Callable[[], int]) -> int:
    """Call ``run() -> exit code``; print a ``UserError`` as one line (any other exception keeps its traceback and exits 1)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted before the save had ended; run the same command again to go on from the last save", file=sys.stderr)
        return 130


def open_experiment(path: Path, overrides: Sequence[str], limit: int | None = None) -> Experiment:
    """Load an experiment; ``limit`` makes a smoke run of its first problems under the name ``<name>-limit<N>``."""
    if limit is None:
        return load_experiment(path, overrides)
    if limit < 1:
        raise ConfigError(f"--limit {limit}: expected at least 1")
    name = load_experiment(path, overrides).name
    smoke = [f"name={name}-limit{limit}", f"dataset.limit={limit}", "label_traces.min_per_class=1", "train_probes.min_per_class=2"]
    smoke += ["generate_traces.target_correct=null", "generate_traces.target_incorrect=null"]
    return load_experiment(path, [*overrides, *smoke])


def parse_shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with 0 <= I < N, e.g. 0/4")
    return Shard(int(index), int(count))


def job_kind(name: str) -> type[Job[Any]]:
    """The job of a module of ``jobs/``: its one subclass of ``Job``."""
    module = registry.load("jobs", name, "job")
    classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    kinds = [kind for kind in classes if issubclass(kind, Job)]
    assert len(kinds) == 1, f"jobs/{name}.py must define exactly one Job, found {[kind.__name__ for kind in kinds]}"
    return kinds[0]


def shard_of_task(start: Start, env: Mapping[str, str] = os.environ) -> Shard:
    """The shard of this process: array tasks times the step's tasks.

    Raises:
        ConfigError: the array's indices have gaps, so that they say nothing about the shards.
    """
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in env:
        task, low, high, step, count = (
            int(env.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if (high - low) // step + 1 != count:
            raise ConfigError(
                f"array of {count} tasks from {low} to {high}: the indices have gaps; submit --array=0-{count - 1}, or give --shard I/N"
            )
        index = (task - low) // step
    return Shard(index * start.ranks + start.rank, count * start.ranks)


def make_job(name: str, experiment: Experiment, shard: Shard | None = None) -> Job[Any]:
    """The job of that name for an experiment."""
    return job_kind(name)(experiment, shard)


def run_job(name: str, experiment: Experiment, shard: Shard | None = None, *, quiet: bool = False) -> int:
    """Start or resume one job of an experiment (one shard of it); see ``run``."""
    return run(make_job(name, experiment, shard), quiet=quiet)


def run(job: Job[Any], *, stop: StopSignal | None = None, quiet: bool = False, meeting: Meeting | None = None) -> int:
    """Start or resume a job and bring it as far as it may go.

    Args:
        meeting: where the other ranks of a distributed job wait for this one, rank 0.
        stop: by default the process's signals and SLURM's end time.
        quiet: print nothing.
    Returns:
        0 when this shard's units are all durable (and, where it was the last shard, the results are published);
        75 when it was stopped and everything so far is durable.
    Raises:
        UserError: bad input, a changed configuration, missing inputs, a held lease, or storage that fails.
    """
    preemption.install()
    if job.shard.count > 1 and not job.shards:
        raise ConfigError(f"--shard {job.shard.index}/{job.shard.count}: {job.name} is not split into shards; run it without --shard")
    stop = stop or own_stop(job)
    if already_finished(job):
        _say(f"{job.name}: finished before ({job.results})", quiet)
        return FINISHED
    try:
        return _advance(job, stop, meeting, quiet)
    except (StorageError, FileNotFoundError):
        if not already_finished(job):  # else another start, or the last shard's, has published and taken the state away meanwhile
            raise
    _say(f"{job.name}: finished by another start ({job.results})", quiet)
    return FINISHED


def _advance(job: Job[Any], stop: StopSignal, meeting: Meeting | None, quiet: bool) -> int:
    """Finish this shard, and where it was the last one publish; an exit code as ``run`` returns it."""
    if shards_to_come(job) is None:
        for needed in job.needs:
            job.results_of(needed)
        job.check()
        claim_state(job)
        if not _finish_shard(job, stop, meeting, quiet):
            return CONTINUE
    if to_come := shards_to_come(job):
        _say(complete(job, to_come), quiet)
        return FINISHED
    ledger = Ledger(job.state / "generations.jsonl")
    job.set_aside = units_set_aside(ledger.with_units_in_flight())
    try:
        if not already_finished(job):  # another shard may have published meanwhile
            publish(job, ledger)
    except LeaseHeld:
        _say(f"{job.name}: shard {job.shard} is complete; another process is publishing the results", quiet)
        return FINISHED
    _say(f"{job.name}: finished ({job.results})", quiet)
    return FINISHED


def complete(job: Job[Any], to_come: int) -> str:
    """What a start says whose shard has nothing left to do."""
    return f"{job.name}: shard {job.shard} is complete; {to_come} of {job.shard.count} shards are still to come"


def _finish_shard(job: Job[Any], stop: StopSignal, meeting: Meeting | None, quiet: bool) -> bool:
    """Bring this shard to its end (True) or as far as it may go; it is ours alone meanwhile."""
    ledger = Ledger(job.state / "generations.jsonl")
    resumed = ledger.path.exists()
    display = ProgressDisplay(job.name, quiet=quiet)
    what = f"{job.experiment.name}/{job.name}" + (f" shard {job.shard}" if job.shard.count > 1 else "")
    with Lease(job.lease_folder, what, facts=display.facts, on_lost=lambda: stop.request("superseded")) as lease:
        job.epoch = lease.epoch
        if already_finished(job):  # by another start, while this one came here
            return True
        require_unchanged(job)  # another start may have come in between with a configuration of its own
        if lease.took_over:
            job.fences.draw(str(job.shard), job.epoch)
        job.set_aside = units_set_aside(ledger.with_units_in_flight())
        if meeting is not None:
            meeting.open(job.epoch)
        _say(f"{job.name}: {'resuming' if resumed else 'starting'}", quiet)
        if not job.marker.exists() and not _generation(job, ledger, stop, display, lease, quiet, meeting):
            if lease.held():
                return False
            raise LeaseHeld(f"{what} was taken over by a later start; this process has stopped and nothing that it still wrote is read")
        job.attempts.unlink(missing_ok=True)
        lease.retire()  # the marker stands: a later start of this shard ends at once
    return True


def _generation(
    job: Job[Any], ledger: Ledger, stop: StopSignal, display: ProgressDisplay, lease: Lease, quiet: bool, meeting: Meeting | None
) -> bool:
    """Run this shard's work until it is complete (True, its marker written) or stopped with everything durable (False)."""
    ledger.start(str(job.shard), job.epoch, launched=job.launched)
    began, saved = time.monotonic(), saving.seconds
    cause = "failed"
    units: int | None = None
    facts: Json = {}
    try:
        work = job.build()
        before = now = work.progress()
        ledger.work(str(job.shard), job.epoch, done=before.done, total=before.total, unit=before.unit)
        with display.watching(work):
            finished = work.run(stop)
        if meeting is not None:
            meeting.leave_together()
        now = work.progress()
        units = now.done - before.done
        cause = "finished" if finished else (stop.cause or "stopped")
        if not lease.held():
            finished, cause, units = False, "superseded", None  # what counts of them is what the one who took over has found
        if finished:
            make_folder(job.marker.parent)
            write_json(job.marker, {"notes": job.receipt_notes, "recorded": job.recorded()})
    except BaseException as error:
        facts = {"error": describe(error), "mendable": isinstance(error, UserError), "in_flight": job.in_flight(job.epoch)}
        if isinstance(error, KeyboardInterrupt):
            cause = "interrupted"
        raise
    finally:
        job.close()
        # where the disk is full this line cannot be written either; the first error is the one to tell
        with contextlib.suppress(StorageError) if facts or not lease.held() else contextlib.nullcontext():
            facts["saving"] = round(saving.seconds - saved, 3)
            ledger.end(str(job.shard), job.epoch, cause=cause, seconds=time.monotonic() - began, units=units, **facts)
    if not finished:
        done = f"{now.done} of {now.total} {now.unit}s" if now.total is not None else f"{now.done} {now.unit}s"
        then = "" if this_start() else "; run the same command again to go on"
        _say(f"{job.name}: stopped ({cause}), {done} saved{then}", quiet)
    return finished


def describe(error: BaseException) -> str:
    """One line: the kind of error, the first line of its message, where it was raised."""
    message = next(iter(str(error).splitlines()), "")[:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames and not isinstance(error, UserError) else ""
    return f"{type(error).__name__}: {message}{where}"


def run_rank(job: Job[Any], meeting: Meeting) -> int:
    """The part of a rank above 0 in a distributed job: the same work, without lease, ledger, marker or publishing."""
    preemption.install()
    if already_finished(job):  # rank 0 sees so too, and opens no meeting
        return FINISHED
    job.epoch = meeting.join()
    stop = own_stop(job)
    try:
        finished = job.build().run(stop)
        meeting.leave_together()
        return FINISHED if finished else CONTINUE
    finally:
        job.close()


def own_stop(job: Job[Any]) -> StopSignal:
    """The process's signals and SLURM's end time."""
    slurm = job.experiment.slurm
    return StopSignal(deadline_s=preemption.deadline_from_environment(slurm.signal_lead_s), save_every_s=slurm.save_every_s)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)
