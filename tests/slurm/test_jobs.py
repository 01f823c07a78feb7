"""Every job that a calibration has, by its shipped script, interrupted once on the real SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.bench import PROJECT, Bench
from tribunal.core.receipts import read_receipt

JOBS = ("train_reasoner", "generate_traces", "label_traces", "extract_activations", "train_probes")
EXPERIMENT = """
name: x
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 40}
generate_traces: {samples_per_problem: 2, max_new_tokens: 120, wave_size: 16}
label_traces: {min_per_class: 5}
extract_activations: {layers: [1], poolings: [mean, last], store_dtype: float32, traces_per_shard: 16}
train_probes: {min_per_class: 5}
train_reasoner: {steps: 30}
"""


@pytest.mark.slow
def test_every_job_interrupted_once_ends_with_the_digest_of_an_undisturbed_run(bench: Bench) -> None:
    bench.env["PYTHONPATH"] = str(PROJECT)
    (bench.folder / "x.yaml").write_text(EXPERIMENT)
    options = [f"--job-name={bench.name}", "--mem=100M", "--output=%x-%j.log"]
    ids = {}
    for job in ("train_reasoner", "generate_traces"):
        ids[job] = bench.call("sbatch", "--parsable", *options, PROJECT / "sbatch" / f"{job}.sbatch", "x.yaml").strip()
    for job in JOBS:
        if job not in ids:
            ids[job] = bench.call("sbatch", "--parsable", *options, PROJECT / "sbatch" / f"{job}.sbatch", "x.yaml").strip()
        bench.until(lambda job=job: bench.rows(job), f"{job} has begun")
        bench.signal(ids[job])
        if job != "train_reasoner":
            bench.finished(job)
    bench.finished("train_reasoner")
    bench.gone()
    expected = undisturbed(bench)
    for job in JOBS:
        receipt = read_receipt(bench.results(job))
        assert receipt is not None and receipt["digest"] == expected[job], f"{job}: another digest than undisturbed"
        assert bench.causes(receipt) == ["asked", "finished"], f"{job}: {bench.causes(receipt)}"
        assert len({row["job"] for row in receipt["generations"]}) == 1
    assert [path.name for path in (bench.folder / "checkpoints" / "x").iterdir()] == ["submissions"]


def undisturbed(bench: Bench) -> dict[str, Any]:
    root = bench.folder / "undisturbed"
    root.mkdir()
    env = {**{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}, "TRIBUNAL_ROOT": str(root)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tribunal.cluster", "train_reasoner,calibrate", bench.folder / "x.yaml"]
    subprocess.run(command, env=env, cwd=bench.folder, check=True, capture_output=True, timeout=300)
    return {path.parent.name: (read_receipt(path.parent) or {})["digest"] for path in Path(root).glob("results/x/*/receipt.json")}
