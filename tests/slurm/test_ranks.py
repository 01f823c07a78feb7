"""Ranks on two nodes, connected by gloo: they agree on one step, all save, one resubmits; a dead rank ends the step; an oracle too."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.bench import PROJECT, Bench

ORACLE = """
name: x
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2], per_digits: 40}
generate_traces: {samples_per_problem: 2, max_new_tokens: 120}
label_traces: {min_per_class: 5}
train_oracle:
  {tasks: [carry, random_bit], lora: {rank: 2, alpha: 4, dropout: 0.1}, batch_size: 4, steps: 30, text_only_steps: 4, validate_every: 10,
   validate_items: 8, keep: 2, max_new_tokens: 4, traces_per_file: 20, audit: {min_per_split: 5}}
"""
OVER_TWO_NODES = ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--time=10")
SLOWLY_S = 240.0


def workers(job: str, rank: int) -> list[int]:
    """Process ids of a rank: its supervisor and the work."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"run_job.py\0steps" in (folder / "cmdline").read_bytes() and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:
            continue  # ended meanwhile
    return sorted(found)


@pytest.mark.slow
def test_four_ranks_stop_on_a_signal_to_one_and_survive_the_death_of_another(slurm: str, tmp_path: Path) -> None:
    whole, stopped = (Bench(tmp_path / name, slurm) for name in ("whole", "stopped"))
    for run in (whole, stopped):
        run.folder.mkdir()
    stopped.sections["steps"] = {"steps": 60, "seconds": 0.25}
    whole.sections["steps"] = {"steps": 60, "seconds": 0}
    try:
        job = stopped.submit("steps", *OVER_TWO_NODES)
        stopped.until(lambda: metrics(stopped) >= 5, "five steps", SLOWLY_S)
        for pid in workers(job, 2):  # SLURM signals a task's whole process group
            os.kill(pid, signal.SIGUSR1)
        stopped.until(lambda: stopped.rows("steps")[0]["ended"], "all ranks have stopped", 60)
        stopped.until(lambda: len(stopped.rows("steps")) == 2 and metrics(stopped, 2) >= 5, "the second generation steps", SLOWLY_S)
        first = stopped.rows("steps")[0]
        assert (first["cause"], first["next"], stopped.rows("steps")[1]["done"]) == ("asked", "requeue", first["units"])
        os.kill(workers(job, 3)[-1], signal.SIGKILL)
        killed = time.monotonic()
        stopped.until(lambda: stopped.rows("steps")[1]["next"], "the death is noticed", 60)
        stopped.until(lambda: not any(workers(job, rank) for rank in range(4)), "the step has ended", 60 - (time.monotonic() - killed))
        assert stopped.rows("steps")[1]["cause"] in ("crashed", "failed")
        receipt = stopped.finished("steps", SLOWLY_S)
        stopped.gone()
        whole.submit("steps", *OVER_TWO_NODES)
        assert receipt["digest"] == whole.finished("steps", SLOWLY_S)["digest"]
        whole.gone()
        assert "Restarts=2 " in stopped.facts(job)
        assert [row["cause"] for row in receipt["generations"]][::2] == ["asked", "finished"]
        assert not stopped.state("steps").exists()
    finally:
        for run in (whole, stopped):
            run.clean_up()


@pytest.mark.slow
def test_an_oracle_trains_on_two_nodes_and_sharded_and_stopped_it_ends_with_the_same_bytes(slurm: str, tmp_path: Path) -> None:
    whole, sharded = (Bench(tmp_path / name, slurm) for name in ("whole", "sharded"))
    options = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--mem=100M", "--cpus-per-task=1", "--output=%x-%j.log"]
    try:
        for run in (whole, sharded):
            run.env["PYTHONPATH"] = str(PROJECT)
            run.folder.mkdir()
            (run.folder / "x.yaml").write_text(ORACLE)
        inputs = [sys.executable, "-m", "tribunal.cluster", "generate_traces,label_traces", str(whole.folder / "x.yaml")]
        subprocess.run(inputs, env=whole.env, cwd=whole.folder, check=True, capture_output=True, timeout=120)
        shutil.copytree(whole.folder / "results", sharded.folder / "results")
        script = PROJECT / "sbatch" / "train_oracle.sbatch"
        for run, setting in ((sharded, "train_oracle.shard=true"), (whole, "train_oracle.shard=false")):
            job = run.call("sbatch", "--parsable", f"--job-name={run.name}", *options, script, "x.yaml", setting).strip()
            if run is sharded:
                run.until(lambda: metrics(sharded, job="train_oracle") >= 3, "three steps", SLOWLY_S)
                run.signal(job)
        receipts = [run.finished("train_oracle", SLOWLY_S) for run in (whole, sharded)]
        for run in (whole, sharded):
            run.gone()
        assert [row["cause"] for row in receipts[1]["generations"]] == ["asked", "finished"], sharded.logs()
        assert 0 < receipts[1]["generations"][0]["units"] < receipts[1]["totals"]["units"]
        assert receipts[0]["digest"] == receipts[1]["digest"], f"{whole.logs()}{sharded.logs()}"
    finally:
        for run in (whole, sharded):
            run.clean_up()


def metrics(run: Bench, epoch: int = 1, *, job: str = "steps") -> int:
    """Steps of a generation so far."""
    path = run.state(job) / "metrics" / f"0-of-1.{epoch}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
