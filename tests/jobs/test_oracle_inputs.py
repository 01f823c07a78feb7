"""What does not belong to a trained oracle is refused before it is asked anything, and nothing is lost by that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.evaluate_oracle import EvaluateOracle
from tests.jobs.test_train_oracle import SMALL, foreign
from tribunal.cluster.launch import run
from tribunal.core.errors import DataError, InputMissing, ModelError
from tribunal.core.records import TraceLabel
from tribunal.core.storage import iter_jsonl, write_jsonl


@pytest.fixture(scope="module")
def trained(calibrated, tmp_path_factory):
    """``trained(folder, override...)``: an evaluation beside a trained oracle that was asked questions of a file."""
    root = tmp_path_factory.mktemp("trained")
    path = root / "mine.jsonl"
    labels = list(iter_jsonl(calibrated.root / "results/small/label_traces/labels.jsonl", TraceLabel))
    kept = [label for label in labels if label.verdict in ("correct", "incorrect")]
    rows = [{"problem_id": label.problem_id, "sample": label.sample, "question": "Is it?", "answer": "no"} for label in kept]
    write_jsonl(path, [row | {"answer": "yes"} if number % 2 else row for number, row in enumerate(rows)])
    settings = (*SMALL, "train_oracle.tasks=[yes_no,random_bit]", f"train_oracle.examples={{yes_no: {path}}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIBUNAL_ROOT", str(root))
        assert run(calibrated.job("train_oracle", root, *settings), quiet=True) == 0

    def make(folder: Path, *overrides: str) -> EvaluateOracle:
        shutil.copytree(root / "results", folder / "results", dirs_exist_ok=True)
        return EvaluateOracle(calibrated.experiment(*settings, *overrides))

    make.questions = path
    return make


def test_a_published_adapter_of_another_model_is_refused_first_and_taking_it_out_is_enough(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    missing = trained(tmp_path, "evaluate_oracle.published=[./nowhere]")
    with pytest.raises(ModelError, match=r"no such folder: \./nowhere"):
        run(missing, quiet=True)
    theirs = trained(tmp_path, f"evaluate_oracle.published=[{foreign(tmp_path)}]")
    with pytest.raises(ModelError, match="was trained on Qwen/Qwen3-8B, but the model is builtin:addition"):
        run(theirs, quiet=True)
    assert run(trained(tmp_path, "evaluate_oracle.items_per_task=8", "evaluate_oracle.bootstrap=100"), quiet=True) == 0


def test_an_oracle_is_not_asked_questions_whose_file_has_changed_since_it_was_trained(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    before = trained.questions.read_text()
    trained.questions.write_text(before.replace('"no"', '"maybe"').replace('"yes"', '"no"').replace('"maybe"', '"yes"'))
    try:
        with pytest.raises(DataError, match=r"trained on other examples than its traces, labels and question files give now"):
            trained(tmp_path).build()
    finally:
        trained.questions.write_text(before)


def test_activations_of_traces_that_were_sampled_anew_are_refused(calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = calibrated.job("train_oracle", tmp_path, *SMALL, "train_oracle.from_store=true")
    for name in ("generate_traces", "label_traces"):
        shutil.rmtree(tmp_path / "results/small" / name)
        assert run(calibrated.job(name, tmp_path, "generate_traces.temperature=0.9"), quiet=True) == 0
    with pytest.raises(InputMissing, match=r"train_oracle reads the results of extract_activations, which are stale"):
        run(job, quiet=True)
