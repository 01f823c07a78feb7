"""The job that trains the built-in reasoner: stopped anywhere and resumed, it publishes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.train_reasoner import Config, TrainReasoner
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, SlurmConfig
from tribunal.core.storage import sha256_file
from tribunal.models import reasoner

SMALL = Config(steps=5, batch_size=4, digits=(2,), digit_weights=(1,), width=16, heads=2, layers=1, mlp_width=16, evaluation_problems=2)


def job(_: Path | None = None) -> TrainReasoner:
    experiment = Experiment(
        name="small",
        path=Path("small.yaml"),
        seed=0,
        model=ModelConfig(name="builtin:addition"),
        dataset=DatasetConfig(name="addition"),
        slurm=SlurmConfig(),
        sections={"train_reasoner": SMALL},
        given=frozenset(),
    )
    return TrainReasoner(experiment)


def test_stopped_after_any_step_and_resumed_it_publishes_the_same_bytes(tmp_path, monkeypatch):
    assert_resume_is_exact(job, tmp_path, monkeypatch, points=5)


def test_it_publishes_a_model_folder_with_its_receipt_and_one_row_per_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    undisturbed(job)
    out = job().results
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    receipt = json.loads((out / "training_receipt.json").read_text())
    assert receipt["weights_sha256"] == sha256_file(out / "model.safetensors")
    assert receipt["steps"] == 5 and receipt["tokens"] > 0 and receipt["recipe"]["width"] == 16
    assert [(row["digits"], row["mode"], row["n"]) for row in receipt["evaluation"]["rows"]] == [(2, "greedy", 2), (2, "temperature 1", 2)]
    assert reasoner.load(out).config.hidden_size == 16
    shipped = {path.name for path in reasoner.folder().iterdir()}
    assert shipped == {path.name for path in out.iterdir()} - {"receipt.json", "metrics.jsonl"}, "the package ships this folder's files"
