"""Whole processes ended by SIGKILL at random moments: every job, every kind of work, same digest in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).with_name("kill_harness.py")
HERE = Path(__file__).resolve().parents[2]
EXPERIMENT = """
name: killed
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 8}
generate_traces: {samples_per_problem: 4, max_new_tokens: 120, slots: 8, wave_size: 16}
label_traces: {min_per_class: 2}
extract_activations: {layers: [1, 2], poolings: [mean, sentence], traces_per_shard: 8, store_dtype: float32}
train_probes: {folds: 3, permutations: 5, random_directions: 2, bootstrap: 100, min_per_class: 2}
train_reasoner: {steps: 16, batch_size: 8, evaluation_problems: 10}
slurm: {save_every_s: 0.05}
"""
JOBS = ["generate_traces", "label_traces", "extract_activations", "train_probes", "train_reasoner"]


def test_every_job_killed_at_random_moments_ends_with_the_undisturbed_digest(tmp_path):
    (tmp_path / "killed.yaml").write_text(EXPERIMENT)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HARNESS), "killed.yaml", "12", "5", *JOBS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[:3000]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["job"] for row in rows] == JOBS
    for row in rows:
        assert row["killed"] == 12
        assert row["digests"] == [row["expected"]], row
        assert row["left"] == [], row
