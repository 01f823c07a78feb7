"""The attribution on the shipped reasoner: exact resume, parts that sum to the signal, and what its report says."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.calibrated import Calibrated
from tests.resume import assert_resume_is_exact, undisturbed
from tests.tiny_traces import make_label, make_trace
from tribunal.activations.poolings import spans
from tribunal.cluster.launch import run
from tribunal.core.errors import ConfigError, LabelError
from tribunal.core.reports import read_report
from tribunal.core.stats import Estimate, Resamples
from tribunal.core.storage import read_json
from tribunal.core.work import Never
from tribunal.models.components import Component, writers
from tribunal.models.loading import load_model
from tribunal.probes.attribution import TOP, Attribution, Gathered, Inputs, Means, Settings, choose
from tribunal.probes.attribution_report import Findings
from tribunal.probes.held_out import read_held_out
from tribunal.probes.training import evenly_spaced

SMALL = [f"attribute_direction.{pair}" for pair in ("traces=60", "random_sets=2", "problems=4", "samples=2", "slots=4", "bootstrap=100")]


def test_stopped_at_any_look_and_resumed_it_ends_with_the_same_digest(calibrated: Calibrated, tmp_path, monkeypatch):
    assert_resume_is_exact(
        lambda folder: calibrated.job("attribute_direction", folder, *SMALL), tmp_path, monkeypatch, points=4, every=False
    )


def test_the_report_adds_up_and_stands_beside_its_controls(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    undisturbed(lambda: calibrated.job("attribute_direction", tmp_path, *SMALL))
    report = read_report(tmp_path / "results/small/attribute_direction/report.json")
    gaps = [row for row in report.rows if row.metric == "logit_gap" and "ablated" not in row.name]
    assert gaps[0].value == pytest.approx(sum(row.value for row in gaps[1:]), abs=1e-4)
    assert report.details["largest_rest_in_logits"] < 1e-3
    assert {control.name for control in gaps[2].controls} == {"random_directions"}
    for metric in ("auroc", "accuracy"):
        row = next(row for row in report.rows if row.metric == metric)
        assert {control.name for control in row.controls} == {"no_steering", "random_choice"}
    job = calibrated.job("attribute_direction", tmp_path, *SMALL)
    measured = [(trace.problem_id, trace.sample) for (trace, _), ranks in zip(job.material.pairs, job.material.ranking) if not ranks]
    held_out = read_held_out(tmp_path / "results/small/train_probes")
    expected = roc_auc_score([held_out.labels[key] for key in measured], [held_out.logit[key] for key in measured])
    untouched = next(row for row in report.rows if row.metric == "auroc").controls[0]
    assert (untouched.name, untouched.value) == ("no_steering", pytest.approx(expected, abs=1e-4))
    assert report.rows[0].n == len(measured)
    assert "planted" in report.verdict
    receipt = read_json(tmp_path / "results/small/attribute_direction/receipt.json")
    assert "contributions.jsonl" in receipt["outputs"]


class Half(Inputs):
    """Inputs without files: six traces, of which the first four rank."""

    def __init__(self, random_sets: int) -> None:
        self.settings = Settings(6, 2, random_sets, 2, 1, 1, None, 1)
        self.seed = 0
        self.labels = np.array([1, 0, 1, 0, 1, 0])
        self.ranking = np.array([True, True, True, True, False, False])


def test_components_are_ranked_on_their_own_half_and_random_sets_are_drawn_from_the_others():
    components = [Component("embedding"), *(Component("head", 0, h) for h in range(6)), Component("mlp", 0)]
    parts = np.zeros((6, len(components)))
    parts[[0, 2], 2], parts[[1, 3], 5] = 3.0, 2.0  # heads 1 and 4 tell right from wrong among the ranking traces
    parts[:, 0] = 100 * Half(4).labels  # the embedding cannot be ablated
    parts[4, 7] = 50.0  # the MLP only among those that measure
    gathered = Gathered(np.arange(6), parts, np.zeros((6, len(components), 2)), np.zeros(6), Means(None, None))
    chosen = choose(components, Half(4), gathered)
    assert chosen["top"] == [components[2], components[5]]
    random = [tuple(chosen[f"random-{n:02d}"]) for n in range(4)]
    assert len(set(random)) == 4
    assert all(Counter(c.kind for c in drawn) == {"head": 2} and not set(drawn) & set(chosen["top"]) for drawn in random)


def test_too_few_traces_are_refused_in_one_line(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = calibrated.job("attribute_direction", tmp_path, "attribute_direction.traces=8", "seed=3")
    calibrated.copy(tmp_path)
    inputs = job.material
    wrong = [i for i in range(len(inputs.pairs)) if inputs.labels[i] == 0][:1]
    with pytest.raises(LabelError, match=r"no right trace among 8; raise attribute_direction\.traces"):
        Inputs([inputs.pairs[i] for i in wrong], {}, inputs.held_out, inputs.settings, 0, rows_per_trace=32)


def test_a_top_without_as_many_others_is_refused(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = calibrated.job("attribute_direction", tmp_path, *SMALL, "attribute_direction.top=9")
    calibrated.copy(tmp_path)
    with pytest.raises(ConfigError, match=r"attribute_direction.top: 9 of the \d+ heads and MLPs .*; set at most \d"):
        run(job, quiet=True)


def test_signal_and_answers_are_taken_under_the_ablation_along_the_traces_own_direction_with_the_same_draws(
    calibrated: Calibrated, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = calibrated.job("attribute_direction", tmp_path, *SMALL)
    inputs, records = job.material, {}
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 120}
    loaded = load_model(job.experiment.model)
    attribution = Attribution(inputs, loaded, records, parts=tmp_path, epoch=0, sampling=sampling, checkpoints=None)
    for item in inputs.plan():
        if item.kind == "writes":
            records.update(*attribution.process(item, Never()))
    held_out = np.array([inputs.held_out.logit[trace.problem_id, trace.sample] for trace, _ in inputs.pairs])
    attribution.chosen = {"none": [], "top": attribution.components.ablatable, "random-00": []}
    for item in inputs.plan():
        if item.condition in attribution.chosen and item.kind != "writes":
            for found in attribution.process(item, Never()):
                records.update(found)
    untouched, ablated = (np.array(records[f"signal/{name}/00000"]["signal"]) for name in ("random-00", "top"))
    np.testing.assert_allclose(untouched, held_out[: len(untouched)], atol=1e-4)
    assert np.abs(ablated - untouched).max() > 0.1
    answers = {name: [records[f"answers/{name}/{attempt.key}"] for attempt in inputs.attempts] for name in attribution.chosen}
    assert answers["random-00"] == answers["none"] != answers["top"]


def test_a_trace_is_read_at_as_many_rows_as_its_probe_was_measured_on():
    trace, ends = make_trace("p", prompt=2, completion=12, readable=12), [(0, 3), (3, 6), (6, 9), (9, 12)]
    attribution = Attribution.__new__(Attribution)
    attribution.pooling, attribution.inputs = "sentence", SimpleNamespace(rows_per_trace=2)
    _, pooled_BL, real_BL = attribution._padded([(trace, make_label(trace, ends))])
    assert pooled_BL[0].nonzero()[:, 0].tolist() == [2 + 5, 2 + 11] and real_BL.sum() == 14
    assert evenly_spaced(spans("sentence", trace, make_label(trace, ends)), 2)[0].end_token == 6


class Found(Findings):
    """Numbers without a run: AUROC and share of right answers by condition."""

    def __init__(self, auroc: dict[str, float], accuracy: dict[str, float]) -> None:
        self.inputs, self.given = Half(20), (auroc, accuracy)
        self.resamples = Resamples(["p"], 100, 0)

    def _of(self, values: dict[str, float], condition: str) -> Estimate:
        value = values.get(condition, values["random"])
        return Estimate(value, np.full(100, value))

    def signal(self, condition, metric):
        return self._of(self.given[0], condition)

    def accuracy(self, condition):
        return self._of(self.given[1], condition)


@pytest.mark.parametrize(
    ("auroc", "accuracy", "sentence"),
    [
        ({"top": 0.6, "random": 0.8}, {"top": 0.5, "random": 0.5}, "the signal leans on them more than on others; that the answers do is"),
        ({"top": 0.6, "random": 0.8}, {"top": 0.6, "random": 0.5}, "the signal leans on them more than on others; that the answers do is"),
        ({"top": 0.6, "random": 0.8}, {"top": 0.4, "random": 0.5}, "cannot be told from what they do for the task"),
        ({"top": 0.8, "random": 0.8}, {"top": 0.4, "random": 0.5}, "So the answers lean on them more than on others"),
        ({"top": 0.8, "random": 0.8}, {"top": 0.5, "random": 0.5}, "not shown to matter more than random ones"),
        ({"top": 0.6, "random": 0.8, "random-03": 0.6, "random-04": 0.5}, {"top": 0.5, "random": 0.5}, "not shown to matter more"),
        ({"top": 0.6, "random": 0.8}, {"top": 0.1, "random": 0.2}, "Even random sets break the answers"),
        (
            {"top": 0.6, "random": 0.8},
            {"top": float("nan"), "random": 0.5},
            "accuracy of new answers is not known, its units were set aside",
        ),
    ],
)
def test_the_verdict_says_what_the_numbers_say(auroc, accuracy, sentence):
    found = Found({"none": 0.9, **auroc}, {"none": 0.7, **accuracy})
    found.chosen, found.components, found.total = {TOP: [Component("mlp", 0)]}, [Component("mlp", 0)], Estimate(1.0, np.ones(100))
    found.parts = [Estimate(0.5, np.ones(100))]
    assert sentence in found.verdict(planted=False)


def test_units_that_were_set_aside_take_their_traces_out_of_every_condition(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = calibrated.job("attribute_direction", tmp_path, *SMALL)
    inputs, records = job.material, {}
    for item in inputs.plan():
        for key in item.keys:
            numbers = range(len(inputs.pairs))[inputs.shard(item.number)]
            records[key] = {"signal": [0.0 for _ in numbers], "verdict": "correct", "tokens": 3}
    lost = inputs.plan()[-1].keys[0]
    del records[lost], records[f"answers/none/{inputs.attempts[1].key}"]
    n = len(inputs.pairs)
    gathered = Gathered(np.arange(n), np.zeros((n, 11)), np.zeros((n, 11, 2)), np.zeros(n), Means(None, None))
    found = Findings(inputs, gathered, writers(1, 4, False), records, bootstrap=100)
    assert {len(right) for _, right, _ in found.answers.values()} == {len(inputs.attempts) - 2}
    assert found.lost == 2
    for attempt in inputs.attempts:
        records.pop(f"answers/top/{attempt.key}", None)
    found = Findings(inputs, gathered, writers(1, 4, False), records, bootstrap=100)
    assert {name: len(right) for name, (_, right, _) in found.answers.items()}["none"] == len(inputs.attempts) - 2
    assert not found.accuracy(TOP).known and "is not known" in found.verdict(planted=False)
