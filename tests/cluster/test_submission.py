"""What submit would queue: resources, scripts, refusals before anything is queued; and the same graph on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.project import HERE, Project, until
from tests.slurm.test_scripts import faults
from tribunal.cluster.launch import make_job
from tribunal.cluster.pipelines import selected
from tribunal.cluster.resources import check_extra, parse_limit, resolve
from tribunal.cluster.scripts import index_list
from tribunal.cluster.supervision import supervise
from tribunal.core.config import load_experiment
from tribunal.core.errors import ConfigError


@pytest.fixture
def project(tmp_path):
    """Without SLURM on PATH, so that the tests say the same wherever they run."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not shutil.which("sbatch", path=folder)]
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sh", "git", "env"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return Project(tmp_path, {"PATH": os.pathsep.join([str(tools), *folders])})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("2-00:00:30", 172830), ("90:00", 5400)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text, seconds):
    assert parse_limit(text, "here") == seconds


@pytest.mark.parametrize("text", ["", "0", "4h", "1:2:3:4", "12:61:00", "-5", "4:00:00 "])
def test_a_malformed_time_limit_is_refused(text):
    with pytest.raises(ConfigError, match="no time limit"):
        parse_limit(text, "x.yaml: slurm")


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--signal=SIGUSR1@60", "set by slurm.signal_lead_s"),
        ("--signal=B:USR1@60", "set by slurm.signal_lead_s"),
        ("--array=0-3", "set by slurm.array"),
        ("comment=x", "no sbatch option"),
        ("--output=x", "set by submit"),
    ],
)
def test_an_extra_option_that_would_break_the_job_is_refused(option, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        check_extra([option], "x.yaml: slurm")


def test_array_indices_are_written_as_ranges():
    assert index_list([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_a_dry_run_prints_graph_and_scripts_and_leaves_nothing_behind(project):
    slurm = {
        "partition": "gpu",
        "account": "lab",
        "qos": "long",
        "constraint": "a100",
        "gres": "gpu:a100",
        "gpus": 1,
        "time": "4:00:00",
        "cpus": 8,
        "mem_gb": 64,
        "exclude": "n7",
        "mail": "me@example.org",
        "array": 8,
        "array_throttle": 4,
        "extra": ["--comment=x"],
        "jobs": {"count": {"gpus": 2, "nodes": 1}, "double": {"partition": "cpu", "time": "0:30:00"}},
    }
    experiment = project.experiment(slurm=slurm)
    text = project.tribunal("submit", experiment, "count", "double", "--dry-run", "--cluster", "local").stdout
    first, second = text.split("# ---- ")[1:]
    options = (
        "partition=gpu account=lab qos=long constraint=a100 gres=gpu:a100:2 time=240 cpus-per-task=8 mem=64GB exclude=n7 comment=x "
        "array=0-7%4 mail-user=me@example.org mail-type=END,FAIL signal=USR1@300 open-mode=append requeue "
        "job-name=numbers.count ntasks-per-node=2 nodes=1"
    )
    for option in options.split(" "):
        assert f"#SBATCH --{option}\n" in first, option
    for script in (first, second):
        lines = script.split("\n", 1)[1].strip()
        assert faults(lines) == [] and subprocess.run(["bash", "-n"], input=lines, text=True).returncode == 0
    assert '--shard "$(((SLURM_ARRAY_TASK_ID) * 2 + SLURM_PROCID))/16"' in first  # one shard per GPU
    assert "--dependency=afterany:<count>" in second
    assert "#SBATCH --partition=cpu\n" in second and "#SBATCH --time=30\n" in second
    assert "gres" not in second and "constraint" not in second  # double needs no GPU, so it asks for nothing that comes with one
    assert "double" in text and "after count" in text
    assert list(project.root.rglob("*")) == []


def test_an_oracle_gets_a_task_for_each_gpu_and_a_job_of_one_process_stays_one():
    experiment = load_experiment(HERE.parent / "experiments" / "demo.yaml", ["slurm={gpus: 4}"])
    tasks = {name: resolve(make_job(name, experiment)).tasks for name in ("train_oracle", "evaluate_oracle")}
    assert tasks == {"train_oracle": 4, "evaluate_oracle": 1}


def test_a_pipeline_labels_sentences_only_where_one_of_its_jobs_reads_the_labels():
    demo, recipe = (load_experiment(HERE.parent / "experiments" / name) for name in ("demo.yaml", "oracle-qwen3-8b.yaml"))
    assert selected(["oracle"], demo) == ("train_oracle", "evaluate_oracle", "report")
    assert selected(["oracle"], recipe) == ("label_sentences", "train_oracle", "evaluate_oracle", "report")
    assert selected(["label_sentences"], demo) == ("label_sentences",), "asked for by name"


def test_a_job_of_one_process_that_was_started_as_several_tasks_is_refused(monkeypatch):
    job = make_job("evaluate_oracle", load_experiment(HERE.parent / "experiments" / "demo.yaml"))
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"evaluate_oracle: started as 2 tasks, .* --ntasks=1"):
        supervise(job, [])


def test_submitting_the_demo_imports_no_torch(tmp_path):
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from tribunal.cli import main; main()"
    command = [sys.executable, "-c", code, "submit", "experiments/demo.yaml", "--dry-run", "--cluster", "local"]
    environment = {**os.environ, "TRIBUNAL_ROOT": str(tmp_path)}
    text = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=True).stdout
    assert "#SBATCH --job-name=demo.extract_activations" in text
    assert text.splitlines()[-1] == "False"


def test_the_site_file_supplies_what_the_experiment_leaves_open(project):
    site = 'TRIBUNAL_SLURM_ACCOUNT=proj-7\nTRIBUNAL_SLURM_PARTITION=short\nTRIBUNAL_MODULES="python/3.11 cuda/12.8"\n# HF_HOME=/x\n'
    (project.folder / ".tribunal-site.env").write_text(site)
    experiment = project.experiment(slurm={"partition": "gpu"})
    text = project.tribunal("submit", experiment, "count", "--dry-run").stdout
    assert "--account=proj-7" in text and "--partition=gpu" in text
    assert "module load python/3.11 cuda/12.8" in text
    assert "HF_HOME" not in text


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"time": "0:05:00"}, "is shorter than signal_lead_s + 90 s"),
        ({"time": "5 hours"}, "slurm.time"),
        ({"signal_lead_s": -1}, "slurm.signal_lead_s"),
        ({"extra": ["--signal=SIGUSR1@"]}, "set by slurm.signal_lead_s"),
        ({"jobs": {"cuont": {}}}, "did you mean 'count'?"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_queued(project, slurm, said):
    result = project.tribunal("submit", project.experiment(slurm=slurm), "count", "--cluster", "local", check=2)
    assert said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert list(project.root.rglob("*")) == []


def test_a_job_whose_input_is_neither_there_nor_queued_is_refused(project):
    result = project.tribunal("submit", project.experiment(), "double", check=2)
    assert "double reads the results of count, which has neither finished nor is queued" in result.stderr


def test_slurm_is_asked_for_where_there_is_none(project):
    result = project.tribunal("submit", project.experiment(), "count", "--cluster", "slurm", check=2)
    assert "sbatch is not on PATH" in result.stderr


def test_the_graph_runs_on_this_machine_through_limits_signals_and_more_rounds_than_submitits_own(project):
    """Each generation is told to stop after its first unit, eight times."""
    experiment = project.experiment(count={"units": 9, "seconds": 0.4}, double={"seconds": 0.0})
    project.tribunal("submit", experiment, "count", "double", "gather")
    told = set()

    def step():
        for row in project.root.glob("checkpoints/numbers/count/generations.jsonl"):
            for line in row.read_text().splitlines():
                if '"event": "work"' in line:
                    epoch = int(re.search(r'"epoch": (\d+)', line)[1])
                    start = next(one for one in row.read_text().splitlines() if '"start"' in one and f'"epoch": {epoch},' in one)
                    if epoch not in told and len(told) < 8:
                        told.add(epoch)
                        os.kill(int(re.search(r'"pid": (\d+)', start)[1]), signal.SIGUSR1)
        return project.finished("gather")

    until(step, what="the chain's end")
    assert len(project.receipt("count")["generations"]) == 9
    assert project.receipt("count")["totals"]["units"] == 9
    assert [row["state"] for row in project.rows()] == ["finished"] * 3
    assert len(project.tribunal("verify", "numbers").stdout.splitlines()) == 3
    (project.root / "results" / "numbers" / "double" / "numbers.json").write_text("[]")
    assert "FAULT" in project.tribunal("verify", "numbers", check=1).stdout


def test_cancel_saves_and_resume_goes_on_with_what_is_unfinished_only(project):
    gate = project.root.parent / "gate"
    experiment = project.experiment(count={"units": 12, "wait_for": {"6": str(gate), "7": str(gate)}}, slurm={"array": 2})
    project.tribunal("submit", experiment, "count", "double", "--cluster", "local")
    until(lambda: any(row["state"] == "running" for row in project.rows()), what="a running shard")
    assert "queued already" in project.tribunal("submit", experiment, "count").stdout
    project.tribunal("cancel", "numbers")
    until(lambda: {row["state"] for row in project.rows()} == {"cancelled"}, what="all cancelled")
    assert not project.finished("count")
    gate.touch()
    project.tribunal("resume", "numbers")
    until(lambda: project.finished("double"), what="the end after resume")
    assert project.receipt("count")["totals"]["units"] == 12
    assert "finished before" in project.tribunal("resume", "numbers").stdout


def test_edits_made_while_a_job_waits_change_nothing(project):
    """The first job stops at a gate; meanwhile the code and the experiment file are spoilt."""
    gate = project.root.parent / "gate"
    experiment = project.experiment(count={"units": 3, "wait_for": {"0": str(gate)}}, double={"factor": 2})
    project.tribunal("submit", experiment, "count", "double")
    until(lambda: any(row["state"] == "running" for row in project.rows()), what="the first job")
    project.experiment(count={"units": 3}, double={"factor": 7})
    (project.folder / "jobs" / "double.py").write_text("raise SystemExit('edited')")
    gate.touch()
    until(lambda: project.finished("double"), what="the second job")
    assert "[\n  0,\n  6,\n  12\n]" in (project.root / "results/numbers/double/numbers.json").read_text()


def test_prefetch_of_what_is_local_needs_no_network_and_what_is_not_there_is_one_line(project):
    assert "0 problems" in project.tribunal("prefetch", project.experiment(model={"name": "builtin:addition"})).stdout
    folder = project.root / "model"
    folder.mkdir()
    assert "a local folder" in project.tribunal("prefetch", project.experiment(model={"name": str(folder)})).stdout
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(project.root / "hf")}
    result = project.tribunal("prefetch", project.experiment(model={"name": "no/where"}), check=2, environment=away)
    assert "model no/where cannot be fetched" in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_the_same_exception_twice_ends_the_chain_on_this_machine_too(project):
    experiment = project.experiment(count={"units": 3, "fail_in_build": True})
    project.tribunal("submit", experiment, "count", "double")
    until(lambda: project.rows()[0]["state"] == "failed", what="failed")
    first, second = project.rows()
    assert first["generation"] == 2 and "same exception" in first["why"] and "no such layer" in first["why"]
    assert second["state"] == "not started"


def test_resume_after_a_failure_gives_a_fresh_budget(project):
    experiment = project.experiment(count={"units": 3, "fail_in_build": True})
    project.tribunal("submit", experiment, "count")
    until(lambda: project.rows()[0]["state"] == "failed", what="failed")
    broken = project.folder / "jobs" / "count.py"
    broken.write_text(broken.read_text().replace("if self.config.fail_in_build:", "if False:"))
    project.tribunal("resume", "numbers")
    until(lambda: project.finished("count"), what="the end with the mended code")
    assert [row["before_resume"] for row in project.receipt("count")["generations"]] == [True, True, False]
    assert "count: finished" in project.tribunal("logs", "numbers").stdout
    assert project.tribunal("logs", "numbers", "count").stdout.count("no such layer") >= 2
