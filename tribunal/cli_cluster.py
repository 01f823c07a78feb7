"""The commands that a cluster's user types on the login node; they register themselves on the ``tribunal`` command.

tribunal submit experiments/gsm8k-qwen3-8b.yaml
tribunal status --watch
tribunal logs gsm8k-qwen3-8b generate_traces -f
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tribunal.cluster import launch
from tribunal.cluster.job import root
from tribunal.core.errors import ConfigError

WATCH_S = 5.0

Words = Annotated[
    list[str] | None,
    typer.Argument(help="jobs or pipelines (default: calibrate), and section.key=value", metavar="[JOB]... [section.key=value]..."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes on top of the file", metavar="[section.key=value]...")]
ExperimentFile = Annotated[Path, typer.Argument(help="the experiment file", metavar="EXPERIMENT.yaml")]
Cluster = Annotated[str | None, typer.Option(help="slurm or local; default: slurm where sbatch is on PATH", metavar="slurm|local")]
Name = Annotated[str, typer.Argument(help="an experiment's name or file", metavar="EXPERIMENT")]
Limit = Annotated[int | None, typer.Option(help="smoke run: the first N problems, under the name <name>-limitN")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (submit, status, logs, cancel, resume, verify, prefetch, doctor, drill):
        app.command()(command)


def submit(
    experiment: ExperimentFile,
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts and the graph; submit nothing")] = False,
    cluster: Cluster = None,
    limit: Limit = None,
) -> None:
    """Submit an experiment's jobs as dependent SLURM jobs; each saves, resubmits itself and resumes until it is finished."""

    def body() -> int:
        from tribunal.cluster import live, submission
        from tribunal.cluster.plan import check_site, make_plan

        where = choose(cluster)
        names = [word for word in words or [] if "=" not in word] or ["calibrate"]
        loaded = launch.open_experiment(experiment, [word for word in words or [] if "=" in word], limit)
        plan = make_plan(loaded, names, {} if dry_run and where == "local" else live.queued(loaded.name))
        if where == "slurm" and shutil.which("sbatch"):
            check_site(plan)
        if dry_run:
            print(submission.dry_run(plan))
            return 0
        ids: dict[str, list[str]] = {}
        if plan.jobs:
            ids = submission.submit_slurm(plan) if where == "slurm" else submission.submit_local(plan)
        print("\n".join(submission.graph(plan, ids)))
        if ids:
            print(f"watch it with: tribunal status {loaded.name} --watch")
        return 0

    run(body)


def status(
    name: Annotated[str | None, typer.Argument(help="an experiment's name or file; default: all", metavar="[EXPERIMENT]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="show it again every few seconds")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
) -> None:
    """Every job and shard: state, units, rate, time left, generation, GPU-hours, and why it is not running."""

    def body() -> int:
        from tribunal.cluster import queue
        from tribunal.cluster import status as view

        while True:
            names = [view.name_of(name)] if name else view.experiments()
            seen = queue.read()
            reports = [view.report(one, seen) for one in names]
            if as_json:
                print(json.dumps([report.as_json() for report in reports], indent=None if watch else 1))
            else:
                text = "\n\n".join(view.table(report) for report in reports) or f"nothing was started under {root()}"
                print(f"\033[H\033[J{text}" if watch and sys.stdout.isatty() else text, flush=True)
            if not watch:
                return 0
            time.sleep(WATCH_S)

    run(body)


def logs(
    name: Name,
    job: Annotated[str | None, typer.Argument(help="one job; default: the one that wrote last", metavar="[JOB]")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on as lines are written")] = False,
    lines: Annotated[int, typer.Option("-n", help="lines of each log")] = 50,
) -> None:
    """Print the logs of an experiment's jobs, across generations."""

    def body() -> int:
        from tribunal.cluster import control
        from tribunal.cluster import status as view

        experiment = view.name_of(name)
        if follow:
            for line in control.follow(experiment, job):
                print(line, flush=True)
            return 0
        files = control.log_files(experiment, job)
        for path in files if job else files[-1:]:
            print(f"==> {path} <==", *control.tail(path, lines), sep="\n")
        return 0

    run(body)


def cancel(name: Name) -> None:
    """Stop an experiment's jobs: what runs saves and stays stopped; tribunal resume goes on."""

    def body() -> int:
        from tribunal.cluster import control
        from tribunal.cluster import status as view

        done = control.cancel(view.name_of(name))
        print("\n".join(done) or "nothing of it is queued or running")
        return 0

    run(body)


def resume(name: Name, cluster: Cluster = None) -> None:
    """Submit again what failed, was cancelled or is unfinished, and nothing else."""

    def body() -> int:
        from tribunal.cluster import control, submission
        from tribunal.cluster import status as view

        experiment = view.name_of(name)
        plan, ids = control.resume(experiment, choose(cluster) if cluster else None)
        print("\n".join(submission.graph(plan, ids)))
        return 0

    run(body)


def verify(name: Name) -> None:
    """Hash again every file that the receipts name; exit code 1 where one differs."""

    def body() -> int:
        from tribunal.cluster import control
        from tribunal.cluster import status as view

        good, faults = control.verify(view.name_of(name))
        print("\n".join([*good, *(f"FAULT {fault}" for fault in faults)]))
        return 1 if faults else 0

    run(body)


def prefetch(experiment: ExperimentFile, overrides: Overrides = None) -> None:
    """Fetch the model and the dataset on a node with network, and read them once with hub access off, as jobs do."""

    def body() -> int:
        from tribunal.cluster import prefetch as fetching

        loaded = launch.open_experiment(experiment, overrides or [])
        for line in fetching.prefetch(loaded):
            print(line, flush=True)
        print(fetching.check_offline(experiment, overrides or []))
        return 0

    run(body)


def doctor(
    experiment: Annotated[
        Path | None, typer.Argument(help="also check its model, dataset and partition", metavar="[EXPERIMENT.yaml]")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="measure the cluster too, with two or three short jobs (about 3 minutes)")
    ] = False,
) -> None:
    """Measure what jobs will meet here: disk, clients, requeue, the real lead of the signal; exit code 1 where something is wrong."""

    def body() -> int:
        from tribunal.cluster import doctor as preflight

        loaded = launch.open_experiment(experiment, []) if experiment else None
        findings = list(preflight.here())
        print(preflight.table(findings), flush=True)
        if submit:
            if choose(None) == "local":
                raise ConfigError("doctor --submit: sbatch is not on PATH here; load the site's SLURM module")
            measured, profile = preflight.on_the_cluster(loaded, lambda line: print(line, file=sys.stderr, flush=True))
            print(preflight.table(measured), f"written for submit: {preflight.save_profile(profile)}", sep="\n")
            findings += measured
        return 1 if any(finding.good is False for finding in findings) else 0

    run(body)


def drill(
    experiment: ExperimentFile,
    words: Words = None,
    cluster: Cluster = None,
    limit: Annotated[int, typer.Option(help="problems of each copy; 0: all of them")] = 4,
) -> None:
    """Interrupt short copies of an experiment at every phase by USR1, TERM, KILL and requeue; compare digests (default job: the first)."""

    def body() -> int:
        from tribunal.cluster import drill as drilling

        names = drilling.chosen([word for word in words or [] if "=" not in word])
        changes = [*drilling.shrink(names), *(word for word in words or [] if "=" in word)]
        loaded = launch.open_experiment(experiment, changes, limit or None)
        results = drilling.run(loaded, names, choose(cluster), lambda line: print(line, file=sys.stderr, flush=True))
        print(drilling.table(results))
        return 0 if all(result.survived for result in results) else 1

    run(body)


def choose(cluster: str | None) -> str:
    """slurm where sbatch is on PATH, else local."""
    if cluster is None:
        return "slurm" if shutil.which("sbatch") else "local"
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"--cluster {cluster}: expected slurm or local")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--cluster slurm: sbatch is not on PATH here; load the site's SLURM module, or use --cluster local")
    return cluster


def run(body: Callable[[], int]) -> None:
    sys.exit(launch.guarded(body))
