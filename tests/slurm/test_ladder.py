"""Where the same id cannot be requeued a fresh job goes on; where nothing can be asked, the command is printed."""

from __future__ import annotations

import os
from pathlib import Path

from tests.slurm.bench import Bench


def count(bench: Bench) -> None:
    bench.sections["count"] = {"units": 40, "seconds": 0.05, "wait_for": {"20": bench.folder / "gate"}}


def without(bench: Bench, *missing: str) -> None:
    """A PATH for the job on which some of SLURM's clients are missing."""
    clients = bench.folder / "bin"
    clients.mkdir()
    for name in ("srun", "sbatch", "scontrol", "squeue", "scancel"):
        if name not in missing:
            (clients / name).symlink_to(next(Path(p) / name for p in os.environ["PATH"].split(":") if (Path(p) / name).exists()))
    for name in ("bash", "sh", "env", "sleep", "rm", "touch", "cat", "mkdir"):
        (clients / name).symlink_to(f"/bin/{name}")
    bench.env["JOB_PATH"] = str(clients)
    script = bench.script

    def with_path(job: str, *, lead_s: int = 15) -> Path:
        path = script(job, lead_s=lead_s)
        path.write_text(path.read_text().replace("exec bash", 'PATH=$JOB_PATH exec "$JOB_PATH/bash"'))
        return path

    bench.script = with_path  # type: ignore[method-assign]


def test_a_refused_requeue_goes_on_as_a_new_job(bench: Bench) -> None:
    count(bench)
    job = bench.submit("count", "--no-requeue", "--partition=cpu", "--time=7")
    bench.running("count", 20)
    bench.signal(job)
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    second = bench.rows("count")[1]["job"]
    facts = bench.facts(second)
    assert second != job and "Partition=cpu" in facts and "TimeLimit=00:07:00" in facts
    assert bench.rows("count")[0]["next"] == "sbatch" and bench.rows("count")[0]["continuation"] == second
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=2)
    log = (bench.folder / f"{bench.name}-{job}.log").read_text()
    assert log.count("=== x/count: generation") == 2, "the continuation goes on in the same log"


def test_an_array_task_goes_on_as_a_new_job_without_the_arrays_environment(bench: Bench) -> None:
    count(bench)
    bench.sections["count"]["wait_for"] = {"21": bench.folder / "gate"}
    job = bench.submit("count", "--no-requeue", "--array=0-1", "--cpus-per-task=2")
    bench.until(lambda: bench.units("count") == 30, "shard 0 is done, shard 1 waits")
    bench.signal(f"{job}_1")
    bench.until(lambda: len(bench.rows("count", "1-of-2")) == 2, "a second generation of shard 1")
    facts = bench.facts(bench.rows("count", "1-of-2")[1]["job"])
    assert "ArrayJobId" not in facts and "CPUs/Task=2" in facts
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=3)


SLOW_AT_FIRST = """#!/bin/bash
mkdir {folder}/slept 2>/dev/null && sleep 7
exec {real} "$@"
"""


def test_each_task_of_a_new_job_goes_on_with_the_shard_it_had(bench: Bench) -> None:
    """An array's element of two tasks, one per GPU, whose requeue is refused twice in a row; sbatch takes longer than KillWait."""
    count(bench)
    without(bench, "sbatch")
    shim = bench.folder / "bin" / "sbatch"
    real = next(Path(p) / "sbatch" for p in os.environ["PATH"].split(":") if (Path(p) / "sbatch").exists())
    shim.write_text(SLOW_AT_FIRST.format(real=real, folder=bench.folder))
    shim.chmod(0o755)
    bench.sections["count"]["wait_for"] = {unit: bench.folder / "gate" for unit in ("22", "23")}
    two_tasks = ("--ntasks=2", "--ntasks-per-node=2", "--gres=gpu:2")
    job = bench.submit("count", "--no-requeue", "--array=0-1", *two_tasks)
    bench.until(lambda: bench.units("count") == 30, "shards 0 and 1 are done, 2 and 3 wait")
    running = f"{job}_1"
    for generation in (2, 3):
        bench.signal(running)
        bench.until(lambda n=generation: [len(bench.rows("count", f"{shard}-of-4")) for shard in (2, 3)] == [n, n], "both shards go on")
        running, other = (bench.rows("count", f"{shard}-of-4")[-1]["job"] for shard in (2, 3))
        assert running == other
        facts = bench.facts(running)
        assert "ArrayJobId" not in facts and "NumTasks=2" in facts and "NtasksPerN:B:S:C=2:" in facts and "TresPerNode=gres:gpu:2" in facts
        bench.until(lambda: all(row["done"] is not None for row in bench.rows("count")), "both have loaded")
    (bench.folder / "gate").touch()
    receipt = bench.whole("count", units=40, generations=8)
    assert {row["gpus"] for row in receipt["generations"]} == {1}


def test_without_scontrol_a_new_job_goes_on(bench: Bench) -> None:
    count(bench)
    without(bench, "scontrol")
    job = bench.submit("count")
    bench.running("count", 20)
    bench.signal(job)
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    assert bench.rows("count")[1]["job"] != job
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=2)


def test_without_scontrol_and_sbatch_the_command_is_printed_and_works(bench: Bench) -> None:
    count(bench)
    without(bench, "scontrol", "sbatch")
    job = bench.submit("count")
    bench.running("count", 20)
    bench.signal(job)
    bench.gone()
    (row,) = bench.rows("count")
    assert row["next"] == "by hand"
    command = row["why"].rpartition("to go on: ")[2]
    assert f"to go on: {command}" in bench.logs()
    (bench.folder / "gate").touch()
    bench.call("bash", "-c", command)
    bench.whole("count", units=40, generations=2)


SUBMITS_AND_FAILS = """#!/bin/bash
{real} "$@" && echo submitted >>{folder}/submitted
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""


def test_a_submission_that_reported_an_error_and_was_accepted_is_not_repeated(bench: Bench) -> None:
    count(bench)
    without(bench, "sbatch")
    shim = bench.folder / "bin" / "sbatch"
    real = next(Path(p) / "sbatch" for p in os.environ["PATH"].split(":") if (Path(p) / "sbatch").exists())
    shim.write_text(SUBMITS_AND_FAILS.format(real=real, folder=bench.folder))
    shim.chmod(0o755)
    job = bench.submit("count", "--no-requeue")
    bench.running("count", 20)
    bench.signal(job)
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=2)
    assert (bench.folder / "submitted").read_text() == "submitted\n"


REFUSES_TWICE = """#!/bin/bash
case "$1" in requeue)
    echo asked >>{folder}/asked
    if [ "$(wc -l <{folder}/asked)" -le 2 ]; then
        echo "scontrol: error: Unable to contact slurm controller (connect failure)" >&2
        exit 1
    fi ;;
esac
exec {real} "$@"
"""


def test_a_controller_that_does_not_answer_is_asked_again(bench: Bench) -> None:
    count(bench)
    without(bench, "scontrol")
    shim = bench.folder / "bin" / "scontrol"
    real = next(Path(p) / "scontrol" for p in os.environ["PATH"].split(":") if (Path(p) / "scontrol").exists())
    shim.write_text(REFUSES_TWICE.format(real=real, folder=bench.folder).replace("wc -l", "/usr/bin/wc -l"))
    shim.chmod(0o755)
    job = bench.submit("count")
    bench.running("count", 20)
    bench.signal(job)
    bench.until(lambda: len(bench.rows("count")) == 2, "a second generation")
    (bench.folder / "gate").touch()
    bench.whole("count", units=40, generations=2)
    assert "Restarts=1 " in bench.facts(job)
