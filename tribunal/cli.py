"""The ``tribunal`` command.

tribunal demo
tribunal run calibrate experiments/gsm8k-r1-distill-llama-8b.yaml dataset.path=gsm8k/test.jsonl
tribunal collect --pack directions.zip
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tribunal import __version__, cli_cluster, cli_monitor, cli_oracle
from tribunal.cluster import launch, preemption
from tribunal.cluster.job import root
from tribunal.cluster.pipelines import jobs_of, run_pipeline, selected
from tribunal.cluster.site import use_site_values

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A reasoning model's chain of thought on trial: jobs that survive their time limit.",
)

ExperimentFile = Annotated[Path, typer.Argument(help="the experiment file", metavar="EXPERIMENT.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes on top of the file", metavar="[section.key=value]...")]
Limit = Annotated[int | None, typer.Option(help="smoke run: the first N problems, under the name <name>-limitN")]


def main() -> None:
    app()


@app.callback()
def site() -> None:
    def body() -> int:
        use_site_values()
        return 0

    if code := launch.guarded(body):
        sys.exit(code)


@app.command()
def demo(overrides: Overrides = None, limit: Limit = None) -> None:
    """Calibrate the built-in reasoner: traces, labels, activations, probes, in a few minutes on a laptop."""
    path = Path(__file__).resolve().parents[1] / "experiments" / "demo.yaml"
    _run("calibrate", path, overrides, limit)


@app.command()
def run(
    what: Annotated[str, typer.Argument(help="a pipeline (calibrate, cross_examine, oracle, trial) or one job", metavar="PIPELINE|JOB")],
    experiment: ExperimentFile,
    overrides: Overrides = None,
    limit: Limit = None,
    shard: Annotated[str | None, typer.Option(help="one job only: work on shard I of N", metavar="I/N")] = None,
) -> None:
    """Run a pipeline or a job in the foreground; run the same command again to resume."""
    _run(what, experiment, overrides, limit, shard)


@app.command()
def collect(
    paths: Annotated[list[Path] | None, typer.Argument(help="folders or direction JSONs; default: results/")] = None,
    csv: Annotated[Path | None, typer.Option(help="write the table as CSV")] = None,
    json: Annotated[Path | None, typer.Option(help="write the table as JSON")] = None,
    pack: Annotated[Path | None, typer.Option(help="put all JSONs and figures into one zip")] = None,
) -> None:
    """Find, validate and tabulate probe-direction JSONs."""

    def body() -> int:
        from tribunal.probes import collect as collector

        collection = collector.collect(paths or [root() / "results"], csv=csv, json=json, pack=pack)
        print(collection.text)
        return 1 if collection.refused else 0

    _guarded(body)


@app.command()
def report(name: cli_cluster.Name) -> None:
    """Make results/<experiment>/report.html now, from whatever has finished."""

    def body() -> int:
        from jobs.report import write_page
        from tribunal.cluster import status

        print(write_page(status.name_of(name)))
        return 0

    _guarded(body)


@app.command()
def monitor(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="the question to ask")] = None,
    problem: Annotated[str | None, typer.Option(help="or the id of one of the dataset's problems", metavar="ID")] = None,
    sample: Annotated[int, typer.Option(min=0, help="which sample: another number, other draws")] = 0,
    layer: Annotated[int | None, typer.Option(help="follow the direction of this layer; default: the best one")] = None,
    pooling: Annotated[str | None, typer.Option(help="of this pooling")] = None,
    kind: Annotated[str | None, typer.Option(help="of this kind of probe")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; default: generate_traces.temperature")] = None,
    page: Annotated[Path | None, typer.Option(help="where the page goes; default: monitor-<experiment>.html")] = None,
) -> None:
    """Watch the experiment's model answer one question, every sentence under its P(correct); writes a page of it."""

    def body() -> int:
        place = cli_monitor.Place(layer, pooling, kind)
        loaded = launch.open_experiment(experiment, overrides or [])
        return cli_monitor.watch(loaded, prompt=prompt, problem=problem, sample=sample, place=place, temperature=temperature, page=page)

    _guarded(body)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _run(what: str, path: Path, overrides: list[str] | None, limit: int | None, shard: str | None = None) -> None:
    def body() -> int:
        preemption.install()
        jobs_of(what)  # an unknown name is told before a fault of the file
        experiment = launch.open_experiment(path, overrides or [], limit)
        names = selected([what], experiment)
        if shard is not None:
            if len(names) > 1:
                raise launch.ConfigError(f"--shard {shard}: '{what}' is a pipeline; shards are for one job")
            return launch.run_job(what, experiment, launch.parse_shard(shard))
        code = run_pipeline(names, experiment)
        if code == 0 and "train_probes" in names:
            from tribunal.probes.collect import conclude

            print(conclude(root() / "results" / experiment.name))
        if code == 0:
            _say_verdicts([name for name in names if name != "train_probes"], root() / "results" / experiment.name)
        return code

    _guarded(body)


def _say_verdicts(names: Sequence[str], results: Path) -> None:
    """What each job that measures has found, and where the page is."""
    from tribunal.core.reports import REPORT, read_report

    for name in names:
        if (path := results / name / REPORT).exists():
            print(f"\n{name}: {read_report(path).verdict}")
    if "report" in names:
        print(f"\n{results / 'report.html'}")


def _guarded(body: Callable[[], int]) -> None:
    sys.exit(launch.guarded(body))


cli_cluster.register(app)
cli_oracle.register(app)


if __name__ == "__main__":
    main()
