"""A job submitted by hand runs what its first start found: edits made while it waits in the queue change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.slurm.bench import PAYLOAD, PROJECT, Bench


def test_edits_made_between_the_starts_of_an_arrays_tasks_change_nothing(bench: Bench) -> None:
    """One task at a time: the first is interrupted after the edits, so the second's first start and the first's second one follow."""
    payload = bench.folder / "payload"
    shutil.copytree(PAYLOAD, payload, ignore=shutil.ignore_patterns("__pycache__"))
    whole = bench.env["PYTHONPATH"]
    bench.env["PYTHONPATH"] = f"{payload}:{PROJECT}"
    bench.sections["count"] = {"units": 12, "seconds": 0.02, "wait_for": {"6": bench.folder / "gate"}}
    job = bench.submit("count", "--array=0-1%1")
    bench.running("count", 3)
    (payload / "jobs" / "count.py").write_text("raise SystemExit('edited')")
    (bench.folder / "x.yaml").write_text("edited")
    bench.signal(f"{job}_0")
    bench.until(lambda: bench.rows("count", "0-of-2")[0]["next"] == "requeue", "the first task's stop")
    (bench.folder / "gate").touch()
    bench.env["PYTHONPATH"] = whole  # of the undisturbed run that it is compared with
    receipt = bench.whole("count", units=12, generations=3)
    assert [row["shard"] for row in receipt["generations"]].count("0-of-2") == 2
    assert "edited" not in bench.logs()


SBATCH = '#!/bin/bash\necho "$TRIBUNAL_HOME $*" >>"$CALLS"\necho $((100 + $(wc -l <"$CALLS")))\n'


def test_a_pipeline_is_copied_when_it_is_queued_and_its_jobs_run_the_copy(tmp_path: Path) -> None:
    """With an sbatch that only notes its arguments; the first job's script then runs with a SLURM that only prints the step."""
    (tmp_path / "x.yaml").write_text("{name: x, model: {name: 'builtin:addition'}, dataset: {name: addition}}")
    for name, text in (("sbatch", SBATCH), ("srun", '#!/bin/bash\nprintf "%s\\n" "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    ours = {"TRIBUNAL_ROOT": str(tmp_path), "TRIBUNAL_VENV": str(Path(sys.executable).parents[1]), "CALLS": str(tmp_path / "calls")}
    env = {**os.environ, **ours, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = PROJECT / "sbatch" / "pipeline.sh"
    subprocess.run([script, tmp_path / "x.yaml", "seed=7"], env=env, check=True, capture_output=True, text=True)
    copy = tmp_path / "checkpoints" / "x" / "submissions" / "0001" / "experiment.yaml"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{PROJECT} --parsable sbatch/generate_traces.sbatch {copy}",
        f"{PROJECT} --parsable --dependency=afterany:101 sbatch/label_traces.sbatch {copy}",
        f"{PROJECT} --parsable --dependency=afterany:102 sbatch/extract_activations.sbatch {copy}",
        f"{PROJECT} --parsable --dependency=afterany:103 sbatch/train_probes.sbatch {copy}",
    ]
    assert "seed: 7\n" in copy.read_text()
    (code,) = copy.parents[1].glob("code-*")
    task = {**env, "SLURM_JOB_ID": "101", "TRIBUNAL_HOME": str(PROJECT)}
    command = [PROJECT / "sbatch" / "task.sh", "jobs.generate_traces", copy]
    step = subprocess.run(command, env=task, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    assert step[-5:] == ["python", "-u", f"{code}/run_job.py", "generate_traces", str(copy)]
    assert not (copy.parents[1] / "slurm-101").exists(), "copied once more"
