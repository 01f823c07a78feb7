"""The attribution on the shipped reasoner: exact resume, parts that sum to the signal, and what its report says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.calibrated import Calibrated
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.core.errors import LabelError
from tribunal.core.reports import read_report
from tribunal.core.storage import read_json
from tribunal.models.components import Component
from tribunal.probes.attribution import Gathered, Inputs, Means, Settings, choose
from tribunal.probes.held_out import read_held_out

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
        Inputs([inputs.pairs[i] for i in wrong], {}, inputs.held_out, inputs.settings, 0)
