"""Submitted through submitit: the graph survives interruptions, and status says at each moment what is going on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.project import Project, until
from tests.slurm.test_deaths import parent_of
from tribunal.cluster.ledger import Ledger

AT_ONCE = ("count.seconds=0", "count.wait_for={}", "double.seconds=0", "steps.seconds=0")
SLURM: dict[str, Any] = {"signal_lead_s": 15, "time": "0:10:00", "mem_gb": 1, "cpus": 1}


class Cluster(Project):
    """A project on the real SLURM, with an experiment name of its own."""

    def __init__(self, folder: Path, conf: str) -> None:
        super().__init__(folder, {"SLURM_CONF": conf})
        self.name = f"t{uuid.uuid4().hex[:10]}"

    def write(self, slurm: dict[str, Any] | None = None, **sections: Any) -> Path:
        return self.experiment(self.name, slurm={**SLURM, **(slurm or {})}, **sections)

    def call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=True).stdout

    def queue(self, form: str = "%i %T %r") -> list[str]:
        lines = self.call("squeue", "-h", "-r", "-o", f"%j|{form}").splitlines()
        return [line.partition("|")[2] for line in lines if line.startswith(f"{self.name}.")]

    def done(self, job: str) -> bool:
        return self.finished(job, self.name)

    def state(self, job: str, shard: int | None = None) -> dict[str, Any]:
        """Its row of a status that has asked SLURM just now."""
        for path in (self.root.parent / "cache" / "tribunal").glob("*.json"):
            path.unlink(missing_ok=True)
        return next(row for row in self.rows(self.name) if row["job"] == job and row["shard"] == shard)

    def units(self, job: str) -> int:
        folder = self.root / "checkpoints" / self.name / job / "journal"
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))

    def interrupt(self, job: str, shard: int | None = None, units: int = 2) -> None:
        """SIGUSR1 to a job (one shard of it) that has made some units durable."""
        until(lambda: self.units(job) >= units, what=f"{units} units of {job}")
        name = f"{self.name}.{job}"
        lines = self.call("squeue", "-h", "-r", "-t", "RUNNING", "-n", name, "-o", "%i %K").splitlines()
        task = next(line.split()[0] for line in lines if shard is None or line.split()[1] == str(shard))
        self.call("scancel", "--signal=USR1", task)

    def gone(self) -> None:
        until(lambda: not self.queue(), what="nothing left in squeue")

    def whole(self, *jobs: str) -> None:
        """Every job ended like an undisturbed one, and nothing is left but the record of the submission."""
        until(lambda: all(self.done(job) for job in jobs), seconds=200, what=f"the end of {jobs}")
        self.gone()
        plain = Project(self.folder.parent / "plain")
        for file in self.folder.glob(f"{self.name}.yaml"):
            (plain.folder / file.name).write_text(file.read_text())
        for job in jobs:
            plain.tribunal("run", job, f"{self.name}.yaml", *AT_ONCE)
            mine, undisturbed = self.receipt(job, self.name), plain.receipt(job, self.name)
            assert mine["digest"] == undisturbed["digest"], job
            assert mine["totals"]["units"] == undisturbed["totals"]["units"], f"{job}: units lost or done twice"
        assert [path.name for path in (self.root / "checkpoints" / self.name).iterdir()] == ["submissions"]
        left = [path for path in self.root.rglob(".*") if "code-" not in str(path)]
        assert not left, f"temporary files or locks left behind: {left}"


@pytest.fixture
def cluster(slurm: str, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, slurm)
    yield made
    for line in made.queue("%i"):
        subprocess.run(["scancel", line], env=made.environment, check=False, timeout=60)


class Background:
    """What takes minutes of waiting, started before the first test of this file and looked at by its last ones."""

    def __init__(self, folder: Path, conf: str) -> None:
        self.limited = Cluster(folder / "limited", conf)
        limit = {"time": "0:02:00", "signal_lead_s": 30, "jobs": {"steps": {"mem_gb": 2}}}
        file = self.limited.write(limit, count={"units": 480, "seconds": 0.5}, steps={"steps": 240, "seconds": 0.8})
        self.limited.tribunal("submit", file, "count", "steps")
        site = Project(folder / "site", {"SLURM_CONF": conf})
        self.profile = site.folder / ".tribunal-site.json"
        command = [
            sys.executable,
            "-c",
            "from tribunal.cli import main; main()",
            "doctor",
            site.experiment(model={"name": "builtin:addition"}, slurm={"jobs": {"count": {"gpus": 1}}}),
        ]
        environment = {**site.environment, "TRIBUNAL_HOME": str(site.folder)}
        self.doctor = subprocess.Popen(
            [*command, "--submit"], cwd=site.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="module", autouse=True)
def background(slurm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    made = Background(tmp_path_factory.mktemp("background"), slurm)
    yield made
    if made.doctor.poll() is None:
        made.doctor.terminate()
    for line in made.limited.queue("%i"):
        subprocess.run(["scancel", line], env=made.limited.environment, check=False, timeout=60)


def test_a_three_stage_chain_with_an_interruption_in_each_ends_like_an_undisturbed_one(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    file = cluster.write(count={"units": 20, "wait_for": {"10": str(gate)}}, double={"seconds": 0.4})
    cluster.tribunal("submit", file, "count", "double", "gather")
    assert "waits for count" in until(lambda: cluster.state("double")["why"].replace("just submitted", ""), what="the reason of double")
    cluster.interrupt("count", units=10)
    until(lambda: "Restarts=1" in cluster.call("scontrol", "show", "job", cluster.queue("%i")[0]), what="the requeue")
    assert not (cluster.root / "checkpoints" / cluster.name / "double").exists(), "the child was released early"
    gate.touch()
    cluster.interrupt("double", units=3)
    cluster.whole("count", "double", "gather")
    assert [len(cluster.receipt(job, cluster.name)["generations"]) for job in ("count", "double", "gather")] == [2, 2, 1]
    assert cluster.tribunal("logs", cluster.name, "count").stdout.count("=== ") == 2, "one banner per generation, nothing overwritten"
    assert "DependencyNeverSatisfied" not in str(cluster.rows(cluster.name))


def test_an_interrupted_array_task_leaves_its_siblings_alone(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    file = cluster.write({"array": 3}, count={"units": 12, "wait_for": {"4": str(gate)}})  # unit 4 is shard 1's second
    cluster.tribunal("submit", file, "count", "double")
    until(lambda: cluster.units("count") >= 9, what="the siblings' units")
    cluster.interrupt("count", shard=1, units=9)
    until(
        lambda: cluster.state("count", 1)["generation"] >= 1 and cluster.state("count", 0)["state"] == "complete",
        what="status of the shards",
    )
    gate.touch()
    cluster.whole("count", "double")
    starts = [row["shard"] for row in cluster.receipt("count", cluster.name)["generations"]]
    assert sorted(starts) == ["0-of-3", "1-of-3", "1-of-3", "2-of-3"]


def test_cancel_stays_cancelled_and_resume_submits_only_what_is_unfinished(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    file = cluster.write({"array": 2}, count={"units": 8, "wait_for": {"3": str(gate)}})
    cluster.tribunal("submit", file, "count", "double")
    until(lambda: cluster.units("count") == 5, what="shard 0 and the first unit of shard 1")
    assert "queued already" in cluster.tribunal("submit", file, "count").stdout
    until(lambda: len(cluster.queue()) == 2, what="shard 0 to leave the queue")
    cluster.tribunal("cancel", cluster.name)
    cluster.gone()
    until(lambda: cluster.state("count", 1)["state"] == "cancelled", what="status after cancel")
    assert cluster.state("count", 0)["state"] == "complete"
    gate.touch()
    assert "1 of 2 x 1 task" in cluster.tribunal("resume", cluster.name).stdout
    cluster.whole("count", "double")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"partition": "nonesuch"}, "no partition 'nonesuch' here; known: "),
        ({"gpus": 99, "jobs": {"count": {"gpus": 99}}}, "sbatch would refuse it"),
        ({"extra": ["--nodelist=n77"]}, "sbatch would refuse it"),
    ],
)
def test_what_the_site_does_not_have_is_refused_before_anything_is_queued(cluster: Cluster, asked: dict[str, Any], said: str) -> None:
    result = cluster.tribunal("submit", cluster.write(asked), "count", check=2)
    assert said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert cluster.queue() == []


def test_more_tasks_than_an_array_may_have_are_split(cluster: Cluster) -> None:
    text = cluster.tribunal("submit", cluster.write({"array": 1500}), "count", "--dry-run").stdout
    assert "#SBATCH --array=0-1000%1001" in text.replace("--array=0-1000\n", "--array=0-1000%1001\n")
    assert "#SBATCH --array=0-498" in text and '--shard "$((SLURM_ARRAY_TASK_ID + 1001))/1500"' in text


@pytest.mark.parametrize("extra", [[], ["--no-requeue"]], ids=["requeued", "requeue refused"])
def test_one_task_per_gpu_each_works_on_a_shard_of_its_own(cluster: Cluster, extra: list[str]) -> None:
    gate = cluster.root.parent / "gate"
    held = {unit: str(gate) for unit in ("22", "23")}  # the last units of shards 2 and 3: the array's second element
    file = cluster.write({"array": 2, "jobs": {"count": {"gpus": 2, "extra": extra}}}, count={"units": 24, "wait_for": held})
    cluster.tribunal("submit", file, "count")
    cluster.interrupt("count", shard=1, units=22)
    until(lambda: [cluster.state("count", shard)["generation"] for shard in (2, 3)] == [2, 2], what="both of its shards go on")
    gate.touch()
    cluster.whole("count")
    generations = cluster.receipt("count", cluster.name)["generations"]
    assert sorted(row["shard"] for row in generations) == [f"{shard}-of-4" for shard in (0, 1, 2, 2, 3, 3)]
    assert {row["gpus"] for row in generations} == {1}
    banners = [line for line in cluster.tribunal("logs", cluster.name, "count").stdout.splitlines() if " | GPUs " in line]
    assert len(banners) == 6 and all(re.search(r"GPUs \d( |$)", line) for line in banners), "each task sees its own GPU alone"


def shim(folder: Path, name: str, body: str) -> dict[str, str]:
    """Put a program of that name before the real one, which it may call as $REAL."""
    real = next(path for path in (Path(part) / name for part in os.environ["PATH"].split(os.pathsep)) if path.exists())
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/bash\nREAL={real}\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_a_submission_whose_answer_was_lost_is_not_repeated(cluster: Cluster) -> None:
    lost = shim(
        cluster.root.parent / "bin",
        "sbatch",
        '"$REAL" "$@" >/dev/null; case "$*" in *--test-only*) exit 0;; esac\necho no answer >&2; exit 1',
    )
    cluster.tribunal("submit", cluster.write(count={"units": 3}), "count", environment=lost)
    cluster.whole("count")
    assert len(cluster.receipt("count", cluster.name)["generations"]) == 1


def test_status_asks_squeue_once_in_30_seconds_and_answers_when_slurm_does_not(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    calls = cluster.root.parent / "calls"
    counted = shim(cluster.root.parent / "bin", "squeue", f'echo >>{calls}; exec "$REAL" "$@"')
    file = cluster.write({"array": 4}, count={"units": 8, "wait_for": {"7": str(gate)}})
    cluster.tribunal("submit", file, "count", "double")
    until(lambda: cluster.units("count") == 7, what="all but the last unit")
    began = time.monotonic()
    for _ in range(5):
        cluster.tribunal("status", cluster.name, environment=counted)
    asked = len(calls.read_text().splitlines()) if calls.exists() else 0
    assert asked <= 1 + (time.monotonic() - began) // 30
    away = {"SLURM_CONF": str(cluster.folder / "none.conf")}
    text = cluster.tribunal("status", cluster.name, environment=away).stdout
    assert "SLURM does not answer" in text
    running = next(line for line in text.splitlines() if "3/4" in line)
    assert "running" in running and "1/2 numbers" in running
    gate.touch()
    cluster.whole("count", "double")


def test_a_task_killed_with_its_parent_stays_down_and_status_gives_the_command_that_goes_on(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    cluster.tribunal("submit", cluster.write(count={"units": 8, "wait_for": {"4": str(gate)}}), "count")
    until(lambda: cluster.units("count") == 4, what="four units")
    ledger = Ledger(cluster.root / "checkpoints" / cluster.name / "count" / "generations.jsonl")
    (row,) = ledger.generations()
    for pid in (parent_of(row["pid"]), row["pid"]):
        with contextlib.suppress(ProcessLookupError):  # the work dies with its parent
            os.kill(pid, signal.SIGKILL)
    cluster.gone()
    assert "JobState=FAILED" in cluster.call("scontrol", "show", "job", row["job"])
    state = cluster.state("count")
    assert state["state"] == "killed", state
    command = re.search(r"to go on: tribunal (\w+ \w+)", state["why"])
    assert command, state["why"]
    gate.touch()
    assert "count" in cluster.tribunal(*command[1].split()).stdout
    cluster.whole("count")


def test_a_held_job_is_explained_with_the_command_that_releases_it(cluster: Cluster) -> None:
    file = cluster.write({"extra": ["--hold"]}, count={"units": 2})
    cluster.tribunal("submit", file, "count")
    row = cluster.state("count")
    assert row["state"] == "waiting" and row["why"] == f"held: scontrol release {row['id']}"
    cluster.call("scontrol", "release", row["id"])
    cluster.whole("count")


def test_doctor_measures_the_site_and_writes_what_submit_uses(background: Background) -> None:
    said, _ = background.doctor.communicate(timeout=300)
    assert background.doctor.returncode == 1, said
    faults = [line.split()[1:5] for line in said.splitlines() if line.startswith("FAULT")]
    assert faults == [["torch", "on", "the", "GPU"]], "the cluster's GPUs are device files and torch cannot use them; all else is in order"
    for line in (
        r"ok +checkpoints/ +.* with fsync, \d+ GB and [\d,]+ files free",
        r"ok +GPU in a GPU job +on n\d, CUDA_VISIBLE_DEVICES=\d; nvidia-smi: ",
        r"GPU in a CPU job +none, as it should be",
        r"ok +exclusive creation +1 of 2 tasks won, on n\d and n\d",
        r"ok +atomic rename +seen whole",
        r"ok +scontrol inside a job +answers",
        r"ok +sbatch inside a job +works",
        r"ok +requeue +same job id again after \d+ s",
        r"ok +log +appended over the requeue",
        r"ok +model and dataset +readable offline",
        r"ok +early signal +a task of srun hears SIGUSR1 \d+ s before SIGTERM",
        r"batch shell +its child heard (?!.*USR1)",
    ):
        assert re.search(line, said), f"{line}\n{said}"
    profile = json.loads(background.profile.read_text())
    assert profile["route"] == "requeue" and profile["signal_lead_s"] >= 300 and profile["measured_lead_s"] > 30


def test_an_item_job_and_a_trainer_run_through_several_real_time_limits_through_submitit(background: Background) -> None:
    cluster = background.limited
    for job in ("count", "steps"):
        until(lambda job=job: cluster.done(job), seconds=600, what=f"the end of {job} over several time limits")
        receipt = cluster.receipt(job, cluster.name)
        assert len(receipt["generations"]) >= 3
        assert {row["cause"] for row in receipt["generations"][:-1]} <= {"time limit", "deadline"}
        assert len({row["job"] for row in receipt["generations"]}) == 1
    cluster.whole("count", "steps")


def test_a_site_without_requeue_or_clients_in_jobs_gets_a_chain_queued_in_advance(cluster: Cluster) -> None:
    gate = cluster.root.parent / "gate"
    (cluster.folder / ".tribunal-site.json").write_text(json.dumps({"route": "chain", "signal_lead_s": 15}))
    file = cluster.write(count={"units": 8, "wait_for": {"4": str(gate)}})
    cluster.tribunal("submit", file, "count", "double")
    assert len(cluster.queue()) == 12, "six generations of each job queued in advance"
    cluster.interrupt("count", units=4)
    gate.touch()
    cluster.whole("count", "double")
