"""The whole calibration, by the command a user types, on small Hugging Face folders of every supported family.

A process of its own imports transformers for five seconds, so where the imports are not what is tested the command runs in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_models import tiny_folder
from tribunal.cli import app
from tribunal.cluster import preemption
from tribunal.core.receipts import read_receipt

EXPERIMENT = """
name: tiny
model: {{name: {model}, dtype: float32}}
dataset: {{name: jsonl, path: problems.jsonl}}
generate_traces: {{import_path: traces.jsonl}}
label_traces: {{min_per_class: 5}}
extract_activations: {{poolings: [mean, last, sentence, prompt_end], traces_per_shard: 16}}
train_probes: {{folds: 3, c: [0.01, 1.0], permutations: 20, bootstrap: 100, random_directions: 5, min_per_class: 5}}
"""


def tribunal(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIBUNAL_ROOT": str(cwd), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tribunal.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)


def tribunal_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same in this process, which has torch and transformers already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("TRIBUNAL_ROOT", str(cwd))
        try:
            result = CliRunner().invoke(app, arguments)
        finally:
            preemption.uninstall()
    assert isinstance(result.exception, SystemExit | None), result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def write_inputs(folder: Path, model: Path) -> Path:
    """24 problems with two right and two wrong traces each, which differ in a word that a probe can read."""
    problems = [{"id": f"p{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    traces = [
        {"problem_id": f"p{i}", "sample": s, "completion": f"Let me add. {'Good' if s < 2 else 'Hmm'}. The answer is {2 * i + s // 2}."}
        for i in range(24)
        for s in range(4)
    ]
    for name, rows in (("problems", problems), ("traces", traces)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(EXPERIMENT.format(model=model))
    return folder / "tiny.yaml"


RUNS = {"qwen3": tribunal, "qwen2": tribunal_here, "llama": tribunal_here, "gpt2": tribunal_here}


@pytest.mark.parametrize("family", RUNS)
def test_imported_traces_are_calibrated_end_to_end_on(family, tmp_path):
    tribunal = RUNS[family]
    experiment = write_inputs(tmp_path, tiny_folder(tmp_path / "model", family))
    result = tribunal("run", "calibrate", str(experiment), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "96 traces (48 correct, 48 incorrect)" in result.stdout
    report = json.loads((tmp_path / "results/tiny/train_probes/report.json").read_text())
    assert report["rows"][0]["value"] > 0.95  # the word is there to be read
    assert "bag_of_words" in {control["name"] for control in report["rows"][0]["controls"]}
    assert report["rows"][0]["gain"]["value"] < 0.05  # and the bag of words reads it as well
    assert read_receipt(tmp_path / "results/tiny/train_probes")["totals"]["generations"] == 1
    again = tribunal("run", "calibrate", str(experiment), cwd=tmp_path)
    assert again.returncode == 0 and "finished before" in again.stdout
    collected = tribunal("collect", "--pack", "all.zip", cwd=tmp_path)
    assert collected.returncode == 0 and "tiny" in collected.stdout, collected.stdout + collected.stderr


@pytest.mark.parametrize(
    ("change", "message", "tribunal"),
    [
        ("model.name=nowhere/at/all", "nowhere/at/all", tribunal),
        ("extract_activations.layers=[7]", "extract_activations.layers: no layer 7", tribunal_here),
        ("extract_activations.poolings=[men]", "did you mean 'mean'?", tribunal),
        ("train_probes.flods=3", "did you mean 'folds'?", tribunal),
        ("model.prompt=chat", "chat template", tribunal_here),
        ("generate_traces.import_path=none.jsonl", "none.jsonl", tribunal),
        ("label_traces.min_per_class=60", "48", tribunal_here),
    ],
)
def test_bad_input_is_one_line_that_names_field_and_cure(change, message, tribunal, tmp_path):
    experiment = write_inputs(tmp_path, tiny_folder(tmp_path / "model", "gpt2"))
    result = tribunal("run", "calibrate", str(experiment), change, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr


def test_a_row_without_an_answer_is_named_by_its_line(tmp_path):
    experiment = write_inputs(tmp_path, tiny_folder(tmp_path / "model", "gpt2"))
    path = tmp_path / "problems.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = json.dumps({"id": "p4", "question": "What is 4 + 4?"})
    path.write_text("\n".join(lines) + "\n")
    result = tribunal("run", "calibrate", str(experiment), cwd=tmp_path)
    assert result.returncode == 2 and "problems.jsonl" in result.stderr and "line 5" in result.stderr and "answer" in result.stderr


def test_results_of_another_experiment_under_the_same_name_are_refused_by_field(tmp_path):
    experiment = write_inputs(tmp_path, tiny_folder(tmp_path / "model", "gpt2"))
    assert tribunal_here("run", "generate_traces", str(experiment), cwd=tmp_path).returncode == 0
    result = tribunal("run", "calibrate", str(experiment), "seed=5", cwd=tmp_path)
    assert result.returncode == 2 and "seed: 0 -> 5" in result.stderr
