"""The monitor's job on the shipped reasoner: resumed to the byte, equal to the stream, its numbers checked by scikit-learn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import brier_score_loss, roc_auc_score

from tests.calibrated import Calibrated
from tests.resume import assert_resume_is_exact
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import FINISHED, make_job, run
from tribunal.core.config import load_experiment
from tribunal.core.errors import ConfigError, CorruptError, ModelError
from tribunal.core.receipts import read_receipt
from tribunal.core.records import Problem
from tribunal.core.reports import read_report
from tribunal.core.storage import read_jsonl
from tribunal.core.work import Never
from tribunal.models.loading import load_model
from tribunal.probes.direction import load
from tribunal.probes.held_out import read_held_out
from tribunal.probes.monitor import Monitor

FEW = (
    "monitor_traces.traces_per_shard=64",
    "monitor_traces.bootstrap=100",
    "monitor_traces.percents=[50]",
    "monitor_traces.positions=[5,30]",
)


@pytest.fixture(scope="module")
def finished(calibrated: Calibrated, tmp_path_factory) -> Path:
    """The results folder of the experiment, monitor_traces among them."""
    root = tmp_path_factory.mktemp("monitored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIBUNAL_ROOT", str(root))
        assert run(calibrated.job("monitor_traces", root, *FEW), quiet=True) == FINISHED
    return root / "results" / "small"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "monitor_traces" / "monitor.jsonl").read_text().splitlines()]


def test_stopped_after_any_shard_and_resumed_it_ends_with_the_same_digest(calibrated, tmp_path, monkeypatch):
    assert_resume_is_exact(lambda root: calibrated.job("monitor_traces", root, *FEW), tmp_path, monkeypatch, points=2)


def test_any_number_of_tasks_gives_the_same_digest(calibrated, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(calibrated.copy(tmp_path)))
    jobs = [make_job("monitor_traces", calibrated.experiment(*FEW), Shard(index, 2)) for index in (1, 0)]
    assert [run(job, quiet=True) for job in jobs] == [FINISHED, FINISHED]
    assert read_receipt(jobs[0].results)["digest"] == read_receipt(finished / "monitor_traces")["digest"]


def test_published_scores_are_those_of_the_stream_and_of_the_held_out_probes(calibrated, finished):
    held_out, directions = read_held_out(finished / "train_probes"), load(finished / "train_probes")
    loaded = load_model(calibrated.experiment().model)
    problems = {problem.id: problem for problem in read_jsonl(finished / "generate_traces" / "problems.jsonl", Problem)}
    published = lines(finished)
    assert len(published) == 240
    for line in published:
        logit = held_out.logit[line["problem_id"], line["sample"]]
        assert line["score"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    for line in published[::60]:
        problem = problems[line["problem_id"]]
        direction = held_out.direction_of(problem.id)
        steps = list(Monitor(directions, direction).stream(loaded, problem, max_new_tokens=120, sample=line["sample"]))
        projections = load_file(finished / "monitor_traces" / line["file"])["projection"][line["start"] :][: line["tokens"]]
        np.testing.assert_allclose([step.projection for step in steps], projections, rtol=1e-4, atol=1e-4)
        told = [sentence.score for step in steps for sentence in step.sentences]
        np.testing.assert_allclose(told, line["sentence_scores"], atol=1e-5)


def test_the_reports_numbers_are_scikit_learns_on_the_published_scores(finished):
    report = read_report(finished / "monitor_traces" / "report.json")
    rows = {(row.name, row.metric): row for row in report.rows if row.stratum is None}
    judged = [line for line in lines(finished) if line["verdict"] in ("correct", "incorrect")]
    labels = np.array([line["verdict"] == "correct" for line in judged])
    half = np.array([line["scores_at_percent"]["50"] for line in judged])
    assert rows["running score, 50 % of the trace", "auroc"].value == pytest.approx(roc_auc_score(labels, half), abs=1e-5)
    assert rows["running score, 50 % of the trace", "brier"].value == pytest.approx(brier_score_loss(labels, half), abs=1e-5)
    held_out = read_held_out(finished / "train_probes")
    alive, biases = np.array([line["tokens"] >= 30 for line in judged]), {e.fold: e.direction.bias for e in held_out.file.folds}
    files = {name: load_file(finished / "monitor_traces" / name)["projection"] for name in {line["file"] for line in judged}}
    at_30 = [files[line["file"]][line["start"] : line["start"] + min(30, line["tokens"])].mean() + biases[line["fold"]] for line in judged]
    row = rows["running score, token 30, traces alive", "auroc"]
    assert row.n == alive.sum() < len(judged) and row.value == pytest.approx(roc_auc_score(labels[alive], np.array(at_30)[alive]), abs=1e-4)
    assert {control.name: control.value for control in row.controls}["length"] == 0.5, "alike for all that are alive"
    decided = rows["verdict decided, all traces", "share_of_trace"]
    assert decided.value == pytest.approx(np.mean([line["decided_at"] for line in judged]), abs=1e-5)
    for line in judged[:20]:
        logits = np.cumsum(files[line["file"]][line["start"] :][: line["tokens"]]) / np.arange(1, line["tokens"] + 1) + biases[line["fold"]]
        first = round(line["decided_at"] * line["tokens"])
        assert len({*(logits[first - 1 :] >= 0).tolist()}) == 1 and (first == 1 or (logits[first - 2] >= 0) != (logits[-1] >= 0))


def test_the_report_says_what_is_measured_and_that_the_signal_is_planted(finished):
    report = read_report(finished / "monitor_traces" / "report.json")
    assert "planted" in report.verdict and "early exit within 1.5 traces' tokens" in report.verdict.lower()
    assert any("an unfinished trace has no answer" in line for line in report.not_supported)
    accuracy = [row for row in report.rows if row.metric == "accuracy"]
    assert {c.name for row in accuracy for c in row.controls} == {"logprob", "length", "random_choice"}
    assert all(row.gain is not None for row in accuracy)
    assert report.details["largest_difference_from_train_probes_in_logits"] < 1e-4
    assert set(report.figures) == {"monitor.png", "early_exit.png"}


def test_another_dtype_or_a_damaged_part_is_refused(calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(ModelError, match="its dtype is float32, the model's bfloat16"):
        calibrated.job("monitor_traces", tmp_path, "model.dtype=bfloat16").build()
    make = partial(calibrated.job, "monitor_traces", tmp_path, *FEW)
    job = make()
    job.state.mkdir(parents=True)
    assert job.build().run(Never())
    part = sorted(job.parts.iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptError, match=str(part)):
        make().publish(tmp_path / "out")


def test_shares_and_budgets_out_of_range_are_refused(calibrated):
    with pytest.raises(ConfigError, match="shares of a trace go from 1 to 100"):
        load_experiment(calibrated.path, ["monitor_traces.percents=[0,50]"])
    with pytest.raises(ConfigError, match="values start at 1"):
        load_experiment(calibrated.path, ["monitor_traces.budgets=[0.5]"])
