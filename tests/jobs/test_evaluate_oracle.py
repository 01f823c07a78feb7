"""The job that judges an oracle: a target that can be read is read, one that cannot is not, and the report says which is which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.evaluate_oracle import EvaluateOracle
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.cluster.launch import run
from tribunal.core.errors import ConfigError
from tribunal.core.reports import read_report

TRAINED = (
    "train_oracle.tasks=[carry,random_bit]", "train_oracle.lora={rank: 16, alpha: 32, dropout: 0.0}", "train_oracle.learning_rate=3.e-3",
    "train_oracle.batch_size=32", "train_oracle.steps=150", "train_oracle.text_only_steps=40", "train_oracle.validate_every=50",
    "train_oracle.keep=3", "train_oracle.examples={test_share: 0.3}", "train_oracle.max_new_tokens=4", "evaluate_oracle.bootstrap=200",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(calibrated, tmp_path_factory):
    """``trained.job(name, folder, override...)``: the calibration with a trained oracle beside it."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIBUNAL_ROOT", str(root))
        assert run(calibrated.job("train_oracle", root, *TRAINED), quiet=True) == 0

    def make(folder: Path, *overrides: str) -> EvaluateOracle:
        if not (folder / "results").exists():
            shutil.copytree(root / "results", folder / "results", copy_function=lambda a, b: Path(b).hardlink_to(a))
        return EvaluateOracle(calibrated.experiment(*TRAINED, *overrides))

    return make


def test_what_the_activations_hold_is_read_and_a_coin_is_not_and_the_verdict_says_so(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    receipt, _ = undisturbed(lambda: trained(tmp_path))
    assert set(receipt["outputs"]) == {"report.json", "items.jsonl", "oracle_results.png"}
    out = tmp_path / "results" / "small" / "evaluate_oracle"
    report = read_report(out / "report.json")
    rows = {row.name: row for row in report.rows}
    carry, coin = rows["carry, exact match"], rows["random_bit, exact match"]
    assert {control.name for control in carry.controls} == {"majority", "text_only", "shuffled", "zeroed", "linear_probe"}
    assert all(carry.low > control.high for control in carry.controls if control.name != "linear_probe")
    assert coin.low <= 0.5 <= coin.high and rows["random_bit, AUROC"].low <= 0.5 <= rows["random_bit, AUROC"].high
    assert coin.gain.low <= 0 and all(control.low <= 0.5 <= control.high for control in coin.controls)
    assert report.details["tasks"]["carry"]["reads_activations"] and not report.details["tasks"]["random_bit"]["reads_activations"]
    assert report.verdict.startswith("Read from the activations: carry ")
    assert "random_bit: reads the prompt, not the activations" in report.verdict and "planted" in report.verdict
    assert rows["carry, AUROC"].value > 0.8 and "carry, ECE" in rows and "carry, macro-F1" in rows
    assert {row["step"] for row in report.details["steps"]} >= {50, 100, 150} and "carry, exact match, step 50" in rows
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    ours = [item for item in items if item["task"] == "carry"]
    assert len(ours) == carry.n
    assert sum(item["answers"]["oracle"] == item["target"] for item in ours) / carry.n == pytest.approx(carry.value, abs=1e-5)
    assert {"oracle", "majority", "text_only", "shuffled", "zeroed", "linear_probe"} <= set(ours[0]["answers"])


def test_stopped_after_any_unit_and_resumed_it_publishes_the_same_answers(trained, tmp_path, monkeypatch):
    few = (
        "evaluate_oracle.items_per_task=6",
        "evaluate_oracle.chunk=4",
        "evaluate_oracle.steps=[50]",
        "evaluate_oracle.traces_per_file=30",
    )
    assert_resume_is_exact(lambda folder: trained(folder, *few), tmp_path, monkeypatch, points=2)


def test_a_published_adapter_answers_the_same_questions_and_another_content_is_another_configuration(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = trained(tmp_path)
    published = shutil.copytree(job.results.parent / "train_oracle" / "adapter", tmp_path / "published")
    asked = f"evaluate_oracle.published=[{published}]"
    before = trained(tmp_path, asked).fingerprint()
    undisturbed(lambda: trained(tmp_path, asked, "evaluate_oracle.steps=[]"))
    rows = {row.name: row for row in read_report(job.results / "report.json").rows}
    ours, theirs = rows["carry, exact match"], rows[f"carry, exact match, adapter {published}"]
    assert (theirs.value, theirs.low, theirs.high) == (ours.value, ours.low, ours.high), "a copy of the oracle is the oracle"
    assert theirs.controls == ours.controls
    assert f"Adapter {published}: read from the activations: carry " in read_report(job.results / "report.json").verdict
    (published / "adapter_config.json").write_text((published / "adapter_config.json").read_text() + " ")
    assert trained(tmp_path, asked).fingerprint() != before


def test_a_checkpoint_that_was_not_kept_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"evaluate_oracle\.steps: no checkpoint of step 7 was kept; there are 50, 100, 150"):
        trained(tmp_path, "evaluate_oracle.steps=[7]").build()


def test_ask_answers_about_a_sentence_beside_the_answers_without_activations(trained, calibrated, tmp_path, monkeypatch, capsys):
    from tribunal.cli_oracle import ask

    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    trained(tmp_path)
    item = next(example for example in trained(tmp_path).evaluation.items["carry"] if example.tokens[-1] > 11)
    sentences = next(
        label["sentences"]
        for line in (tmp_path / "results/small/label_traces/labels.jsonl").read_text().splitlines()
        if (label := json.loads(line))["problem_id"] == item.problem_id and label["sample"] == item.sample
    )
    number = next(i for i, span in enumerate(sentences) if span["end_token"] == item.tokens[-1])

    def put(**changes) -> tuple[int, str, str]:
        given = {"trace": item.trace_key, "sentence": number, "layer": None, "step": None, **changes}
        with pytest.raises(SystemExit) as ended:
            ask(calibrated.path, "c", **given)
        return ended.value.code, *capsys.readouterr()

    code, said, _ = put()
    assert code == 0 and "(step " in said and "11 tokens at layer 1" in said
    assert "with nothing injected: " in said and "trained without activations: " in said
    for changes, message in {
        ("trace", "1+1/0"): "no such trace",
        ("sentence", 99): "sentences, 0 to",
        ("layer", 9): "has 3 layers, 0 to 2",
        ("step", 7): "no adapter was kept there; kept are 50, 100, 150",
    }.items():
        code, _, error = put(**dict([changes]))
        assert code == 2 and message in error and error.count("\n") == 1
