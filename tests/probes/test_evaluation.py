"""The report of a small made-up experiment whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.probes.helpers import make_world, train
from tribunal.core import reports
from tribunal.core.errors import LabelError
from tribunal.core.storage import sha256_file
from tribunal.probes.direction import load
from tribunal.probes.table import read_table
from tribunal.probes.training import ProbeTraining


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """(folder, evaluation) of the world whose signal is in the activations."""
    out = tmp_path_factory.mktemp("run") / "train_probes"
    return out, train(world, out)


def rows_of(folder, **wanted):
    rows = reports.read_report(folder / "report.json").rows
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def test_a_label_that_is_pure_length_gives_a_gain_of_about_zero(tmp_path):
    world = make_world(tmp_path / "world", signal="length", problems=100)
    train(world, tmp_path / "out")
    headline = rows_of(tmp_path / "out", metric="auroc")[0]
    assert headline.value > 0.8
    assert headline.gain.over == "length"
    assert abs(headline.gain.value) < 0.03 and headline.gain.low < 0 < headline.gain.high
    assert "no clear gain" in reports.read_report(tmp_path / "out" / "report.json").verdict


def test_a_signal_in_the_activations_is_a_gain_over_every_control_with_its_interval(run):
    folder, evaluation = run
    headline = rows_of(folder, metric="auroc")[0]
    assert headline.gain.low > 0.1 and headline.low <= headline.value <= headline.high
    assert {control.name for control in headline.controls} == {
        "majority", "length", "finish", "bag_of_words", "question_only", "logprob", "layer_0", "permuted_labels", "random_directions",
    }  # fmt: skip
    assert all(gain["low"] > 0 for gain in evaluation.gains().values())


def test_the_headline_is_the_auroc_of_scores_whose_choices_did_not_see_them(run):
    folder, evaluation = run
    nested = evaluation.nested
    assert sorted(nested.trace) == list(range(len(evaluation.labels)))
    headline = rows_of(folder, name="probe chosen in the folds", metric="auroc", stratum=None)[0]
    assert headline.value == pytest.approx(roc_auc_score(evaluation.labels, nested.logits), abs=1e-5)
    for fold, cell in enumerate(evaluation.choice_of_fold):
        assert cell.fit.fits["logistic"].inner_auroc[fold] == max(c.fit.fits["logistic"].inner_auroc[fold] for c in evaluation.candidates)


def test_only_whole_readings_of_the_trace_are_candidates(run):
    _, evaluation = run
    assert {cell.pooling for cell in evaluation.candidates} == {"mean"}


def test_prompt_end_and_permuted_labels_are_at_chance_within_problems(run):
    folder, _ = run
    for row in rows_of(folder, metric="within_problem_pairs"):
        control = {control.name: control for control in row.controls}["permuted_labels"]
        assert control.low <= 0.5 <= control.high
        if "prompt_end" in row.name:
            assert row.value == 0.5


def test_every_layer_pooling_and_kind_has_a_row_and_strata_have_theirs(run):
    folder, _ = run
    names = {row.name for row in rows_of(folder, metric="auroc", stratum=None)}
    for layer in (0, 1):
        for pooling in ("mean", "sentence", "prompt_end"):
            assert {f"layer {layer}, {pooling}", f"layer {layer}, {pooling}, ridge", f"layer {layer}, {pooling}, diff_of_means"} <= names
    assert {row.stratum for row in rows_of(folder, name="layer 1, mean")} == {None, "2 digits", "3 digits"}


def test_sentence_rows_count_each_trace_once(run, world):
    _, evaluation = run
    cell = evaluation.cell[1, "sentence"]
    scores = evaluation.scores(cell)
    assert len(scores.trace) == 3 * len(evaluation.labels)
    assert scores.weights.sum() == pytest.approx(len(evaluation.labels))


def test_the_truncated_trace_is_left_out_unless_asked_for(world):
    table = read_table(world.traces, world.labelled)
    assert len(table) == len(world.labels) - 1 and table.counts["truncated"] == 1
    with_it = read_table(world.traces, world.labelled, truncated_as_incorrect=True)
    assert len(with_it) == len(world.labels) and with_it.labels[0] == 0


def test_the_same_inputs_give_the_same_bytes(run, world, tmp_path):
    folder, _ = run
    train(world, tmp_path / "again")
    for name in ("report.json", "implicit_value_directions.json", "probe_results.png"):
        assert sha256_file(folder / name) == sha256_file(tmp_path / "again" / name), name


def test_the_direction_file_scores_the_stored_activations_as_the_final_fit_does(run, world):
    from tribunal.activations.store import ActivationSet

    folder, evaluation = run
    directions = load(folder)
    acts = ActivationSet.open(world.activations).read(directions.best.layer, directions.best.pooling)
    fit = evaluation.best.fit.fits["logistic"]
    np.testing.assert_allclose(directions.select().logits(acts), acts.double().numpy() @ fit.vector + fit.bias, atol=1e-6)
    assert roc_auc_score(world.labels, directions.score(acts)) > 0.8
    assert len(directions.directions) == 2 * 3 * 3


def test_traces_without_log_probabilities_lose_that_control_and_the_report_says_so(tmp_path):
    world = make_world(tmp_path / "world", logprobs=False)
    train(world, tmp_path / "out", kinds=["logistic"], permutations=0, random_directions=0)
    report = reports.read_report(tmp_path / "out" / "report.json")
    assert all(control.name != "logprob" for row in report.rows for control in row.controls)
    assert any("logprob" in sentence for sentence in report.not_supported)


def test_a_pooling_without_rows_is_left_out_and_the_report_says_so(tmp_path):
    world = make_world(tmp_path / "world", poolings=["think_end", "sentence"])
    evaluation = train(world, tmp_path / "out", kinds=["logistic"], permutations=0, random_directions=0)
    report = reports.read_report(tmp_path / "out" / "report.json")
    assert any(sentence.startswith("Probes on think_end: 0 correct and 0 incorrect traces") for sentence in report.not_supported)
    assert len(evaluation.nested.trace) == len(evaluation.labels) == report.rows[0].n


def test_too_few_of_a_class_is_refused_with_the_counts(world):
    right, wrong = int(world.labels[1:].sum()), int((1 - world.labels[1:]).sum())
    with pytest.raises(LabelError, match=f"{right} correct and {wrong} incorrect traces, at least 1000 of each") as error:
        folders = {"traces": world.traces, "labels": world.labelled, "activations": world.activations}
        ProbeTraining(**folders, settings=world.settings(min_per_class=1000), seed=0)
    assert "labels.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_planted_signal_is_called_planted(run):
    _, evaluation = run
    assert "planted" in evaluation.verdict(planted=True)
    assert any("planted" in sentence for sentence in evaluation.not_supported(planted=True, missing=[]))
    assert "planted" not in evaluation.verdict(planted=False)
