"""The job that makes the page: of whatever has finished, made anew when that changed, last in every plan."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import report
from jobs.report import Config, ReportPage
from tests.project import Project, until
from tests.report.examples import experiment as example
from tests.report.examples import finish, measure, row
from tests.resume import StopAfter, killed, names_left
from tests.toy import toy_experiment
from tribunal.cluster import pipelines, plan, waiting
from tribunal.cluster.launch import CONTINUE, FINISHED, job_kind, run
from tribunal.cluster.ledger import Ledger
from tribunal.cluster.slurm import Start
from tribunal.core import registry
from tribunal.core.config import Experiment, load_experiment
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.receipts import read_receipt

ROOT = Path(__file__).resolve().parents[2]
NAME = "gsm8k-try"


def small(**values: Any) -> Experiment:
    made = toy_experiment()
    made.name, made.sections = NAME, {"report": Config(**values)}
    return made


def job(**values: Any) -> ReportPage:
    return ReportPage(small(**values))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return example(tmp_path, name=NAME)


def test_the_page_lies_in_the_jobs_folder_and_on_top_and_the_receipt_names_what_it_shows(results: Path):
    assert run(job(), quiet=True) == FINISHED
    page = (results / "report.html").read_text()
    assert page == (results / "report" / "report.html").read_text() and "The verdict of a_newcomer" in page
    receipt = read_receipt(results / "report")
    assert receipt is not None
    expected = {
        name: (read_receipt(results / name) or {})["digest"] for name in ("generate_traces", "label_traces", "train_probes", "a_newcomer")
    }
    assert receipt["config"] == {"report": {}, "inputs": expected}


def test_it_is_made_anew_after_a_new_result_and_only_then(results: Path):
    run(job(), quiet=True)
    first = (results / "report" / "receipt.json").read_bytes()
    assert run(job(after=["steer"]), quiet=True) == FINISHED
    assert (results / "report" / "receipt.json").read_bytes() == first
    measure(results, "steer", [row("added")])
    assert run(job(), quiet=True) == FINISHED
    for page in (results / "report.html", results / "report" / "report.html"):
        assert "The verdict of steer" in page.read_text()
    assert [path.name for path in results.iterdir() if path.name.startswith(".")] == []


def test_a_stop_and_a_result_that_comes_meanwhile_leave_a_page_with_that_result(results: Path):
    assert run(job(), stop=StopAfter(0), quiet=True) == CONTINUE
    measure(results, "steer", [row("added")])
    made = job()
    assert run(made, quiet=True) == FINISHED
    assert "The verdict of steer" in (results / "report.html").read_text() and not made.state.exists()


def test_a_result_that_comes_just_after_the_page_was_made_has_it_made_anew(results: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def page(name: str) -> str:
        calls.append(made(name))
        if len(calls) == 2:  # the first one is the unit's, the second one is published
            measure(results, "steer", [row("added")])
        return calls[-1]

    made = report.page
    monkeypatch.setattr(report, "page", page)
    assert run(job(), quiet=True) == FINISHED
    assert "The verdict of steer" not in (results / "report.html").read_text()
    assert run(job(), quiet=True) == FINISHED
    assert "The verdict of steer" in (results / "report.html").read_text()


def test_stopped_or_killed_before_publishing_it_makes_the_same_page(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run(job(), quiet=True) == FINISHED
    undisturbed = (results / "report.html").read_bytes()
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / "again"))
    again = example(tmp_path / "again", name=NAME)
    assert run(job(), stop=StopAfter(0), quiet=True) == CONTINUE

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ReportPage, "publish", killed)
        run(job(), quiet=True)
    assert not (again / "report").exists()
    assert run(job(), quiet=True) == FINISHED
    assert (again / "report.html").read_bytes() == undisturbed


def test_killed_at_any_rename_while_it_is_made_anew_it_leaves_nothing_behind(results: Path, tmp_path: Path):
    assert run(job(), quiet=True) == FINISHED
    for number in itertools.count(1):
        measure(results, "steer", [row("added")], verdict=f"The verdict number {number}.")
        died = killed(job, number, ["rename", "replace"])
        assert run(job(), quiet=True) == FINISHED
        assert f"The verdict number {number}." in (results / "report.html").read_text()
        assert (results / "report.html").read_bytes() == (results / "report" / "report.html").read_bytes()
        assert names_left(tmp_path) == [], f"killed before change {number}"
        if not died:
            break
    assert number > 10


def test_nothing_finished_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(DataError, match="no job has finished there"):
        run(job(), quiet=True)


def test_a_job_to_wait_for_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="did you mean 'train_probes'"):
        job(after=["train_probe"]).check()


# Under SLURM --------------------------------------------------------------------------------------------------------------


def waits(made: ReportPage, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the job puts itself back into the queue."""
    asked = []
    monkeypatch.setattr(waiting.slurm, "ask", lambda *_, **__: None)
    go_on = lambda *_, **__: asked.append(1) or SimpleNamespace(why="put back", next="requeued")  # noqa: E731
    monkeypatch.setattr(waiting, "Continuation", lambda *_, **__: SimpleNamespace(go_on=go_on))
    code = waiting.wait_for_inputs(made, Start("7", "7", 0, 0, 1), ["x"])
    assert (code == waiting.CONTINUE) == bool(asked) and code in (None, waiting.CONTINUE)
    return bool(asked)


def test_it_waits_for_the_jobs_that_come_and_goes_on_without_those_that_were_given_up(results: Path, monkeypatch: pytest.MonkeyPatch):
    assert not waits(job(), monkeypatch)
    assert not waits(job(after=["train_probes", "label_traces"]), monkeypatch)
    assert waits(job(after=["train_probes", "extract_activations"]), monkeypatch)
    ledger = Ledger(job().state.parent / "extract_activations" / "generations.jsonl")
    ledger.path.parent.mkdir(parents=True)
    ledger.start("0-of-1", 1)
    assert waits(job(after=["extract_activations"]), monkeypatch)
    ledger.end("0-of-1", 1, cause="failed", seconds=1.0, units=0)
    ledger.decided("0-of-1", 1, next="nothing", why="failed: out of luck")
    assert not waits(job(after=["extract_activations"]), monkeypatch)
    (results / "train_probes" / "receipt.json").unlink()  # it reads extract_activations, so it will not come either
    assert not waits(job(after=["extract_activations", "train_probes"]), monkeypatch)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return load_experiment(ROOT / "experiments" / "demo.yaml", ["dataset.per_digits=2"])


def test_a_plan_has_it_last_after_every_other_job(demo: Experiment):
    made = plan.make_plan(demo, ["report", "calibrate"], {"train_reasoner": {None: "77"}})
    *others, last = made.jobs
    assert [planned.job.name for planned in others] == list(pipelines.PIPELINES["calibrate"])
    assert last.job.name == "report" and last.resources.gpus == 0
    assert set(last.parents) == {planned.job.name for planned in others} and last.after == ("77",)
    again = load_experiment(demo.path, last.overrides).section("report", Config)
    assert set(again.after) == {*last.parents, "train_reasoner"}


def test_a_page_that_is_up_to_date_is_planned_again_where_results_are_to_come(demo: Experiment, tmp_path: Path):
    finish(tmp_path / "results" / "demo", "train_reasoner")
    assert run(ReportPage(demo), quiet=True) == FINISHED
    assert plan.make_plan(demo, ["report"], {}).skipped == [("report", "finished before")]
    planned = plan.make_plan(demo, ["report", "generate_traces"], {}).jobs
    assert [one.job.name for one in planned] == ["generate_traces", "report"]


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_a_pipeline_has_jobs_that_exist_each_after_what_it_reads_and_a_script(name: str):
    jobs = pipelines.PIPELINES[name]
    earlier = {"calibrate": set()}.get(name, set(jobs) | set(pipelines.PIPELINES["calibrate"]))
    for place, one in enumerate(jobs):
        assert one in registry.names("jobs") and (ROOT / "sbatch" / f"{one}.sbatch").exists()
        assert set(job_kind(one).needs) <= set(jobs[:place]) | (earlier - set(jobs))
    assert "report" not in jobs[:-1]


def test_submitted_with_others_on_this_machine_it_comes_last_and_shows_them(tmp_path: Path):
    project = Project(tmp_path)
    shutil.copy(ROOT / "jobs" / "report.py", project.folder / "jobs")
    file = project.experiment(count={"units": 4, "seconds": 0.0}, double={"seconds": 0.0})
    project.tribunal("submit", file, "report", "double", "count", "--cluster", "local")
    until(lambda: project.finished("report"), what="the page")
    assert list(project.receipt("report")["config"]["inputs"]) == ["count", "double"]
    assert "double" in (project.root / "results" / "numbers" / "report.html").read_text()


def by_hand(folder: Path, *words: str) -> tuple[list[list[str]], str]:
    """What sbatch/pipeline.sh asks of sbatch, and its complaint."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nwc -l < {folder}/calls\n')
    (folder / "bin" / "sbatch").chmod(0o755)
    done = subprocess.run(
        [ROOT / "sbatch" / "pipeline.sh", *words],
        env={"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin", "TRIBUNAL_ROOT": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = folder / "calls"
    return [line.split() for line in calls.read_text().splitlines()] if calls.exists() else [], done.stderr


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_the_script_that_submits_by_hand_knows_the_same_pipelines(tmp_path: Path, name: str):
    calls, _ = by_hand(tmp_path, name, "experiments/demo.yaml", "seed=1")
    jobs = [job for job in pipelines.PIPELINES[name] if job != "label_sentences"]  # which no task of the demo reads
    copied = calls[0][2]
    assert load_experiment(copied).seed == 1
    for place, (job_name, call) in enumerate(zip(jobs, calls, strict=True)):
        wait = [f"--dependency=afterany:{place}"] if place else []
        more = [f"report.after=[{','.join(jobs[:place])}]"] if job_name == "report" else []
        assert call == ["--parsable", *wait, f"sbatch/{job_name}.sbatch", copied, *more]


def test_the_script_that_submits_by_hand_calibrates_by_default_and_refuses_what_it_does_not_know(tmp_path: Path):
    (tmp_path / "a").mkdir()
    calls, _ = by_hand(tmp_path / "a", "experiments/demo.yaml")
    assert [call[-2] for call in calls] == [f"sbatch/{job_name}.sbatch" for job_name in pipelines.PIPELINES["calibrate"]]
    assert by_hand(tmp_path, "calibrat", "x.yaml") == (
        [],
        "error: unknown pipeline or job 'calibrat'; did you mean 'calibrate'?\n",
    )


def test_the_command_takes_a_name_or_a_file_and_prints_where_the_page_is(results: Path):
    command = [sys.executable, "-c", "from tribunal.cli import main; main()", "report"]
    done = subprocess.run([*command, NAME], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{results / 'report.html'}\n", 0), done.stderr
    assert not (results / "report").exists()
    failed = subprocess.run([*command, "another"], capture_output=True, text=True)
    assert failed.returncode == 2 and f"known: {NAME}" in failed.stderr
