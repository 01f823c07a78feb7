"""Whatever dies - the process, the node, the disk - the run ends whole, and a copy that lost its lease harms nothing."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bench import Bench
from tests.slurm.conftest import CLUSTER


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_kill_9_at_20_random_moments(slurm: str, tmp_path: Path) -> None:
    """Four runs side by side, each killed five times: while it loads, or at a random moment of its work."""
    draw = random.Random(20)
    runs: list[tuple[Bench, str, list[float | None]]] = []
    for number in range(4):
        run = Bench(tmp_path / str(number), slurm)
        run.folder.mkdir()
        run.slurm.update(no_progress_generations=10)
        run.sections["count"] = {"units": 400, "seconds": 0.02, "slow_import": run.folder / "importing"}
        runs.append((run, run.submit("count"), [None if draw.random() < 0.25 else draw.uniform(0, 1.2) for _ in range(5)]))
    for kill in range(5):
        for run, _, moments in runs:
            run.until((run.folder / "importing").exists, f"generation {kill + 1} loads")
            generation = run.rows("count")[-1]
            durable = run.units("count")
            if moments[kill] is not None:
                (run.folder / "importing").unlink()
                run.running("count", durable + 1)
                time.sleep(moments[kill] or 0)
            os.kill(generation["pid"], signal.SIGKILL)
            if moments[kill] is None:
                (run.folder / "importing").unlink()
    for run, job, _ in runs:
        run.until((run.folder / "importing").exists, "the last generation loads")
        (run.folder / "importing").unlink()
        receipt = run.whole("count", units=400, generations=6)
        assert run.causes(receipt) == ["crashed"] * 5 + ["finished"]
        assert {row["job"] for row in receipt["generations"]} == {job}
        assert receipt["set_aside"] == []
        run.clean_up()


def test_the_work_dies_with_its_supervisor_and_a_new_submission_goes_on(bench: Bench) -> None:
    bench.sections["count"] = {"units": 40, "seconds": 0.02, "wait_for": {"20": bench.folder / "gate"}}
    bench.submit("count")
    bench.running("count", 20)
    worker = bench.rows("count")[0]["pid"]
    os.kill(parent_of(worker), signal.SIGKILL)
    bench.until(lambda: not lives(worker), "the work ends with its supervisor", 30)
    bench.gone()
    (bench.folder / "gate").touch()
    bench.submit("count")
    bench.whole("count", units=40, generations=2)


def test_an_orphan_whose_parent_died_stops_by_itself(bench: Bench) -> None:
    bench.sections["count"] = {"units": 40, "seconds": 0.02, "wait_for": {"20": bench.folder / "gate"}}
    script = bench.folder / "wrapped.sbatch"
    work = f"{sys.executable} -m jobs.count {bench.experiment()}; true"  # a shell that stays as the parent
    script.write_text(f"#!/bin/bash\n#SBATCH --job-name={bench.name} --output=%j.log --time=5\nsrun bash -c {shlex.quote(work)}\n")
    bench.call("sbatch", script)
    bench.running("count", 20)
    worker = bench.rows("count")[0]["pid"]
    supervisor = parent_of(worker)
    os.kill(parent_of(supervisor), signal.SIGKILL)
    bench.until(lambda: not lives(worker) and not lives(supervisor), "both have stopped", 30)
    bench.gone()


@pytest.fixture
def node(bench: Bench) -> Iterator[str]:
    """A node that the test may lose."""
    yield "n5"
    subprocess.run([CLUSTER, "start-node", "n5"], check=True)
    bench.until(lambda: bench.call("scontrol", "update", "NodeName=n5", "State=RESUME", check=False) or True, "resumed")
    bench.until(lambda: bench.call("sinfo", "-h", "-n", "n5", "-p", "frail", "-o", "%t").strip() in ("idle", "mix"), "n5 is back", 60)


def test_a_lost_node_with_the_old_process_alive_ends_with_one_writer(bench: Bench, node: str) -> None:
    bench.sections["count"] = {"units": 300, "seconds": 0.1, "wait_for": {"200": bench.folder / "gate"}}
    job = bench.submit("count", "--partition=frail", "--exclude=n6")
    bench.running("count", 5)
    old = bench.rows("count")[0]
    assert old["host"] == node
    slurmd = int((Path(bench.env["SLURM_CONF"]).parent / "run" / f"slurmd.{node}.pid").read_text())
    os.kill(slurmd, signal.SIGKILL)
    bench.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    bench.until(lambda: "PENDING" in " ".join(bench.queue()), "the controller has requeued the job")
    bench.call("scontrol", "update", f"JobId={job}", "ExcNodeList=")
    bench.until(lambda: len(bench.rows("count")) == 2, "the second copy has started")
    assert lives(old["pid"]), "the first copy was meant to be alive still"
    bench.until(lambda: not lives(old["pid"]), "the first copy stops by itself", 60)
    (bench.folder / "gate").touch()
    receipt = bench.finished("count")
    bench.gone()
    assert receipt["digest"] == bench.undisturbed("count")["digest"]
    first, second = receipt["generations"]
    assert second["restarts"] == 1 and second["host"] != node
    assert (first["cause"], first["next"]) == ("superseded", "nothing")
    assert second["done"] + second["units"] == 300, "what the first copy wrote after the takeover is not read"
    assert not bench.state("count").exists()


@pytest.fixture
def small_disk(bench: Bench) -> Iterator[Path]:
    folder = bench.folder / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_by_name_and_more_room_lets_it_go_on(bench: Bench, small_disk: Path) -> None:
    bench.env["TRIBUNAL_ROOT"] = str(small_disk)
    bench.sections["count"] = {"units": 40, "seconds": 0.01, "kilobytes": 500}
    job = bench.submit("count")
    bench.gone()
    assert "No space left on device. Everything saved earlier is intact" in bench.logs()
    facts = bench.facts(job)
    assert "ExitCode=2:0" in facts and "Restarts=0 " in facts, "a full disk is no reason to be queued again"
    journal = small_disk / "checkpoints" / "x" / "count" / "journal"
    done = sum(path.read_bytes().count(b"\n") for path in journal.glob("*.jsonl"))
    assert 5 < done < 16
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    bench.submit("count")
    bench.until((small_disk / "results" / "x" / "count").exists, "finished")
    bench.gone()
    (bench.folder / "results").symlink_to(small_disk / "results")
    receipt = bench.finished("count")
    assert receipt["digest"] == bench.undisturbed("count")["digest"]
    assert receipt["totals"]["units"] == 40
    assert not [path for path in small_disk.rglob(".*")]
