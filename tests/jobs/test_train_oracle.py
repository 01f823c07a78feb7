"""The job that trains an activation oracle: exact resume, a folder that PEFT loads, and bad input refused before any step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from jobs.train_oracle import TrainOracle
from tests.resume import StopAfter, assert_resume_is_exact, undisturbed
from tribunal.activations.store import META
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.cluster.pipelines import run_pipeline
from tribunal.core.errors import ConfigError, LabelError, ModelError, UserError
from tribunal.core.receipts import RECEIPT, digest, hash_outputs
from tribunal.core.storage import write_json, write_jsonl
from tribunal.models.loading import load_model
from tribunal.oracle.report import about_text_only
from tribunal.oracle.settings import adapter_digest, read_facts

SMALL = (
    "train_oracle.tasks=[carry,random_bit]", "train_oracle.lora={rank: 2, alpha: 4, dropout: 0.1}", "train_oracle.learning_rate=3.e-3",
    "train_oracle.batch_size=8", "train_oracle.batch_tokens=160", "train_oracle.steps=4", "train_oracle.text_only_steps=2",
    "train_oracle.validate_every=2", "train_oracle.validate_items=8", "train_oracle.keep=2", "train_oracle.traces_per_file=150",
    "train_oracle.audit={min_per_split: 5}", "train_oracle.max_new_tokens=4",  # what has learned nothing never ends an answer
)  # fmt: skip


@pytest.fixture
def make(calibrated, tmp_path, monkeypatch):
    """``make(override...)`` is a fresh job on a copy of the calibration's results."""
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return lambda *overrides: calibrated.job("train_oracle", tmp_path, *SMALL, *overrides)


def test_stopped_at_any_point_and_resumed_it_publishes_the_same_adapters_and_the_same_curve(calibrated, tmp_path, monkeypatch):
    assert_resume_is_exact(lambda folder: calibrated.job("train_oracle", folder, *SMALL), tmp_path, monkeypatch, points=4, every=False)


def test_it_publishes_adapters_that_peft_loads_each_with_a_card_that_is_true_of_it_and_metrics_audit_and_figure(make):
    untouched = load_model(make().experiment.model).model
    ids = torch.arange(3, 20)[None]
    plain = untouched(ids).logits
    undisturbed(make)
    out = make().results
    assert torch.equal(untouched(ids).logits, plain), "the next job of this process gets the model without adapter"
    facts = read_facts(out)
    assert facts.kept == [2, 4] and facts.best_step in (2, 4) and facts.planted
    folders = [out / "adapter", out / "text_only", *(facts.adapter(out, step) for step in facts.kept)]
    for folder in folders:
        peft = PeftModel.from_pretrained(untouched, str(folder))
        assert not torch.equal(untouched(ids).logits, plain)
        peft.unload()
        card = (folder / "README.md").read_text()
        assert "base_model: builtin:addition" in card and "planted" in card and str(out.parents[2]) not in card
    cards = {folder.name: (folder / "README.md").read_text() for folder in folders}
    for name, steps in {"adapter": facts.best_step, "step-000002": 2, "step-000004": 4}.items():
        assert f"This is step {steps} of 4" in cards[name] and f"Trained for {steps} steps, of a schedule of 4," in cards[name]
        assert "Vectors go in at the output of block 1" in cards[name]
        assert "share of right answers (fuzzy), for free answers the mean F1 over words;" in cards[name]
        assert ("the best by validation" in cards[name]) == (steps == facts.best_step)
    control = cards["text_only"]
    assert "without any\nactivation: nothing is put in" in control and "Trained for 2 steps, of a schedule of 2," in control
    assert not any(word in control for word in ("Vectors go in", "validation", "injection"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["step"]) for row in rows] == [("oracle", i) for i in range(1, 5)] + [("text_only", 1), ("text_only", 2)]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4]
    assert set(rows[1]["validation"]["tasks"]) == {"carry", "random_bit"}
    assert set(json.loads((out / "audit.json").read_text())["tasks"]) == {"carry", "random_bit"}
    assert (out / "training.png").stat().st_size > 10_000


def test_an_oracle_goes_on_from_a_published_adapter(make, tmp_path):
    undisturbed(make)
    folder = make().results.rename(tmp_path / "published")
    receipt, _ = undisturbed(
        lambda: make(f"train_oracle.start_from={folder / 'adapter'}", "train_oracle.steps=2", "train_oracle.text_only_steps=0")
    )
    config = json.loads((make().results / "adapter" / "adapter_config.json").read_text())
    card = (make().results / "adapter" / "README.md").read_text()
    assert f"from the adapter {adapter_digest(str(folder / 'adapter'))};" in card and str(tmp_path) not in card
    assert config["r"] == 2 and not (make().results / "text_only").exists() and receipt["config"]["train_oracle"]["start_from"]
    facts = read_facts(make().results)
    assert facts.start_from == adapter_digest(str(folder / "adapter"))
    assert about_text_only(facts) == ["A comparison with an adapter trained without activations: train_oracle.text_only_steps is 0."]
    shorter, started = about_text_only(facts.model_copy(update={"text_only_steps": 1}))
    assert "1 steps, the oracle 2" in shorter and f"it started from {facts.start_from}, which may have seen some" in started


def test_tensorboard_shows_all_generations_as_one_run_with_the_loss_and_each_tasks_score(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = lambda: make("train_oracle.tracker=tensorboard", "train_oracle.text_only_steps=0")  # noqa: E731
    stop = StopAfter(5)  # files first, then steps
    assert run(tracked(), stop=stop, quiet=True) == CONTINUE
    assert run(tracked(), quiet=True) == FINISHED
    [folder] = (tmp_path / "tracking").iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 2, "a file for each generation"
    shown = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in shown.Scalars("eval/carry_score")] == [2, 4]
    assert folder.name.startswith("small-") and "tracker" not in tracked().fingerprint()["train_oracle"]


def test_a_tracker_that_is_not_installed_is_refused(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it could not be imported
    with pytest.raises(ConfigError, match="tensorboard is not installed here: pip install tensorboard"):
        make("train_oracle.tracker=tensorboard")


def test_wandb_gets_all_generations_under_one_run_id(make, tmp_path, monkeypatch):
    """Offline: each generation leaves a folder that `wandb sync` sends to the same run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked = lambda: make("train_oracle.tracker=wandb", "train_oracle.text_only_steps=0")  # noqa: E731
    assert run(tracked(), stop=StopAfter(5), quiet=True) == CONTINUE
    assert run(tracked(), quiet=True) == FINISHED
    [folder] = (tmp_path / "tracking").iterdir()
    runs = [path.name for path in folder.glob("wandb/offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(f"-{folder.name}") for name in runs)


def foreign(tmp_path: Path, **changes: str) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B", **changes})
    return folder


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["train_oracle.tasks=[carri]"], ConfigError, r"unknown task 'carri'; did you mean 'carry'"),
        (["train_oracle.examples={layers: [1, 3]}"], ConfigError, r"examples\.layers: no layer 3; the model has 3 layers, 0 to 2"),
        (["train_oracle.examples={layers: [1, 1]}"], ConfigError, r"train_oracle\.examples\.layers: .*layer 1 is given twice"),
        (["train_oracle.injection={layer: 7}"], ConfigError, r"injection\.layer: no layer 7"),
        (["train_oracle.injection={layer: 2}"], ConfigError, r"injection\.layer: 2 is the last block: no later token sees"),
        (["train_oracle.tasks=[yes_no]"], ConfigError, r"task 'yes_no' needs examples\.yes_no"),
        (["train_oracle.tracker=tensorbord"], ConfigError, r"train_oracle\.tracker"),
        (["train_oracle.examples={yes_no: gone.jsonl}"], ConfigError, r"train_oracle\.examples\.yes_no: no such file: gone\.jsonl"),
        (["train_oracle.examples={pairs: gone.jsonl}"], ConfigError, r"train_oracle\.examples\.pairs: no such file: gone\.jsonl"),
        (["train_oracle.batch_size=0"], ConfigError, r"train_oracle\.batch_size"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(make, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        make(*overrides).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "world", "message"),
    [
        ("train_oracle.batch_size=9", "2", r"batch_size: 9 examples in a step cannot be shared equally by 2 processes; set a multiple"),
        ("train_oracle.shard=true", "1", r"shard: this is one process, which has nobody to share with"),
    ],
)
def test_a_number_of_processes_that_does_not_suit_is_refused_before_anything_is_read(make, monkeypatch, override, world, message):
    monkeypatch.setenv("WORLD_SIZE", world)
    job = make(override)
    with pytest.raises(ConfigError, match=message):
        job.build()
    assert not (job.state / "parts").exists()


def test_a_question_file_is_known_by_its_content(make, tmp_path):
    path = tmp_path / "mine.jsonl"
    asked = [f"train_oracle.examples={{yes_no: {path}}}", "train_oracle.tasks=[yes_no]"]
    found = []
    for answer in ("yes", "no"):
        write_jsonl(path, [{"problem_id": "1+1", "question": "Is it?", "answer": answer}])
        found.append(make(*asked).fingerprint())
    assert found[0] != found[1] and make().fingerprint()["files"] == {}


def test_an_adapter_of_another_model_is_refused_before_any_job_of_the_pipeline(make, tmp_path):
    for setting in (f"train_oracle.start_from={foreign(tmp_path)}", f"evaluate_oracle.published=[{foreign(tmp_path)}]"):
        with pytest.raises(ModelError, match=r"was trained on Qwen/Qwen3-8B, but the model is builtin:addition"):
            run_pipeline(("train_oracle", "evaluate_oracle"), make(setting).experiment)
    assert not make().state.exists()


def test_wandb_without_a_login_is_refused_before_anything_is_read(make, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = make("train_oracle.tracker=wandb")
    with pytest.raises(ConfigError, match=r"nobody is logged in to wandb here: run `wandb login` .* WANDB_MODE=offline"):
        job.build()
    assert not (job.state / "parts").exists()


def test_activations_of_another_revision_are_refused_before_any_step(make):
    job = make("train_oracle.from_store=true")
    folder = job.results.parent / "extract_activations"
    meta = json.loads((folder / META).read_text())
    (folder / META).unlink()  # it is linked to the fixture's
    write_json(folder / META, {**meta, "model": {**meta["model"], "revision": "folder:other"}})
    (folder / RECEIPT).unlink()
    outputs = hash_outputs(folder)
    write_json(folder / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})
    with pytest.raises(UserError, match=r"activations of another model \(revision: folder:other"):
        job.build()


def test_labels_that_cannot_be_trained_on_are_refused_with_the_table(make):
    with pytest.raises(LabelError, match=r"carry.*too few examples") as caught:
        make("train_oracle.audit={min_per_split: 5000}").build()
    assert "most frequent target" in str(caught.value)


def test_what_label_sentences_worries_about_is_told_before_training(make, caplog):
    job = make("train_oracle.tasks=[carry,sentence_class]")
    folder = job.results.parent / "label_sentences"
    folder.mkdir()
    (folder / "sentences.jsonl").touch()
    write_json(folder / "audit.json", {"warnings": ["in 9 of 9 traces ..."]})
    outputs = hash_outputs(folder)
    write_json(folder / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})
    with pytest.raises(LabelError, match="sentence_class: no examples at all"):
        job.build()
    assert "label_sentences: in 9 of 9 traces ..." in caplog.messages


def test_the_audit_knows_how_long_an_answer_may_be(make):
    with pytest.raises(LabelError, match=r"context_prediction: targets of up to \d+ tokens, but answers end at 3"):
        make("train_oracle.tasks=[context_prediction]", "train_oracle.max_new_tokens=3").build()


def test_only_the_results_that_the_tasks_ask_for_are_needed(calibrated, tmp_path):
    def needs(*overrides: str) -> tuple[str, ...]:
        return TrainOracle(calibrated.experiment(*SMALL, *overrides)).needs

    assert needs() == ("generate_traces", "label_traces")
    assert needs("train_oracle.tasks=[carry,sentence_class]") == ("generate_traces", "label_traces", "label_sentences")
    assert needs("train_oracle.from_store=true") == ("generate_traces", "label_traces", "extract_activations")
