"""The shipped recipe for Qwen3-8B: its numbers, and the whole of it on a small chat model that reads words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import tiny_folder
from tribunal.cluster.pipelines import PIPELINES, run_pipeline
from tribunal.core.config import load_experiment
from tribunal.core.reports import read_report
from tribunal.core.storage import write_jsonl

RECIPE = Path(__file__).resolve().parents[2] / "experiments" / "oracle-qwen3-8b.yaml"
SHRUNK = (
    "model.revision=null", "model.dtype=float32", "dataset={name: jsonl, path: problems.jsonl}",
    "generate_traces={import_path: traces.jsonl}", "label_traces={min_per_class: 5}",
    "train_oracle.examples.layers=[0, 1, 2]", "train_oracle.placeholder=<unk>", "train_oracle.lora={rank: 2, alpha: 4}",
    "train_oracle.steps=4", "train_oracle.batch_size=4",
    "train_oracle.validate_items=4", "train_oracle.keep=1", "train_oracle.max_new_tokens=24", "train_oracle.examples.longest_context=4",
    "train_oracle.audit={min_per_split: 4, max_class_share: 1.0}", "train_oracle.examples.validation_share=0.2",
    "evaluate_oracle={items_per_task: 12, bootstrap: 100}",
)  # fmt: skip


def problems_and_traces(count: int) -> tuple[list[dict], list[dict]]:
    """Word problems, each with a right and a wrong chain of thought of several kinds of sentences."""
    problems, traces = [], []
    for n in range(count):
        a, b = 12 + 7 * n, 5 + 3 * n
        question = f"A shop has {a} red and {b} blue marbles. How many marbles does it have?"
        problems.append({"id": f"p{n}", "question": question, "answer": str(a + b)})
        for sample, slip in enumerate((0, 10)):
            said = a + b + slip
            thought = (
                "The question asks how many marbles there are.\nThe shop has red ones and blue ones.\n"
                f"First, I will add the red and the blue ones.\nThe red ones are {a}.\nThe blue ones are {b}.\n{a} + {b} = {said}.\n"
                f"Wait, let me check that again.\nSo the total is {said}.\n"
            )
            completion = f"{thought}</think>\nThe answer is \\boxed{{{said}}}."
            traces.append({"problem_id": f"p{n}", "sample": sample, "completion": completion, "finish_reason": "stop"})
    return problems, traces


def test_the_recipe_has_the_published_numbers():
    config = load_experiment(RECIPE).section("train_oracle", __import__("jobs.train_oracle").train_oracle.Config)
    assert config.examples.layers == [9, 18, 27] and config.injection.model_dump() == {
        "layer": 1, "scale": 1.0, "mode": "add", "norm_matched": True
    }  # fmt: skip
    assert config.lora.model_dump() == {"rank": 64, "alpha": 128, "dropout": 0.05, "targets": "all-linear"}
    assert (config.learning_rate, config.batch_size, config.epochs, config.schedule, config.warmup) == (1e-5, 16, 1, "linear", 0.1)


@pytest.mark.slow
def test_the_whole_recipe_runs_on_a_small_chat_model_that_reads_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    problems, traces = problems_and_traces(40)
    write_jsonl(tmp_path / "problems.jsonl", problems)
    write_jsonl(tmp_path / "traces.jsonl", traces)
    folder = tiny_folder(tmp_path / "model", thinking=True, positions=1024)
    experiment = load_experiment(RECIPE, [f"model.name={folder}", *SHRUNK])
    assert run_pipeline(["generate_traces", "label_traces", *PIPELINES["oracle"]], experiment) == 0
    results = tmp_path / "results" / "oracle-qwen3-8b"
    report = read_report(results / "evaluate_oracle" / "report.json")
    asked = {row.name.partition(",")[0] for row in report.rows}
    assert asked == set(experiment.sections["train_oracle"].tasks)
    items = [json.loads(line) for line in (results / "evaluate_oracle" / "items.jsonl").read_text().splitlines()]
    assert {tuple(item["layers"]) for item in items} == {(0,), (1,), (2,)}
    assert any("sentence" in item["question"] for item in items) and (results / "report.html").exists()
    config = json.loads((results / "train_oracle" / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
