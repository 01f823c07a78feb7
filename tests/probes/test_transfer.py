"""What was trained on one kind and tested on another: held out everywhere, and said in plain words."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.probes.helpers import make_world
from tribunal.activations.store import ActivationSet
from tribunal.core import reports
from tribunal.core.errors import DataError
from tribunal.core.stats import Estimate
from tribunal.probes.direction import Place
from tribunal.probes.training import ProbeTraining
from tribunal.probes.transfer import Transfer, auroc_by_fold, read_part, same_problems
from tribunal.probes.transfer_report import Scored, publish

PLACE = Place(layer=1, pooling="mean", kind="logistic")


def opened(world) -> ProbeTraining:
    folders = {"traces": world.traces, "labels": world.labelled, "activations": world.activations}
    return ProbeTraining(**folders, settings=world.settings(), seed=0)


def fitted(transfer: Transfer, parts):
    """Fit every row; returns the records and the arrays of every row by key."""
    parts.mkdir(exist_ok=True)
    plan = [(matrix, kind) for matrix in transfer.matrices for kind in matrix.kinds]
    keys = [matrix.key(kind) for matrix, kind in plan]
    records = {key: transfer.fit_row(*item, parts / f"{n}.safetensors") for n, (key, item) in enumerate(zip(keys, plan))}
    return records, {key: read_part(record, parts) for key, record in records.items()}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    parts = tmp_path_factory.mktemp("transfer") / "parts"
    transfer = Transfer("made", opened(world), {}, PLACE, permutations=20)
    records, arrays = fitted(transfer, parts)
    out = parts.parent / "out"
    out.mkdir()
    publish(transfer, records, out, parts=parts, experiment="made", resamples=200, planted=False)
    return transfer, records, arrays, reports.read_report(out / "report.json")


def test_an_entry_is_sklearn_trained_on_one_stratum_without_the_fold_and_applied_to_the_other(run, world):
    transfer, records, arrays, _ = run
    table, folds = transfer.own.table, transfer.own.folds
    acts = ActivationSet.open(world.activations)
    place = {(row.problem_id, row.sample): i for i, row in enumerate(acts.rows("mean"))}
    acts = acts.read(1, "mean").double().numpy()[[place[key] for key in table.keys]]
    stratum = np.array(table.strata)
    for j, tested in enumerate(("2 digits", "3 digits")):
        ours = np.flatnonzero(stratum == tested)
        expected = np.empty(len(ours))
        for fold in range(4):
            seen = (stratum == "2 digits") & (folds != fold)
            c = records["difficulty/2 digits"]["c_of_fold"][fold]
            pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-10, solver="newton-cg"))
            pipeline.fit(acts[seen], table.labels[seen])
            expected[folds[ours] == fold] = pipeline.decision_function(acts[ours][folds[ours] == fold])
        np.testing.assert_allclose(arrays["difficulty/2 digits"][f"probe.{j}"], expected, atol=1e-5)


def test_an_auroc_counts_the_pairs_that_one_fold_scored():
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 2, 60), np.repeat([0, 1, 2], 20)
    scores = labels + rng.standard_normal(60) + 50 * folds  # every fold's probe at its own height
    pairs = [
        (labels[folds == f].sum() * (1 - labels[folds == f]).sum(), roc_auc_score(labels[folds == f], scores[folds == f])) for f in range(3)
    ]
    expected = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
    assert auroc_by_fold(folds)(scores, labels, np.ones((1, 60)))[0] == pytest.approx(expected)
    assert abs(roc_auc_score(labels, scores) - expected) > 0.1


def test_the_verdict_says_what_transfers_and_what_does_not(run):
    transfer, _, _, report = run
    sentences = {sentence.split(" (")[0]: sentence for sentence in report.verdict.split(". ")}
    assert "transfers without a measurable loss" in sentences["Between difficulties"]  # one signal in both strata
    assert "over the best control carried over the same way" in sentences["Between difficulties"]
    assert "does not transfer" in sentences["Between layers"]  # layer 0 knows nothing
    assert [matrix.axis for matrix in transfer.matrices] == ["difficulty", "position", "layer"]
    assert any(line.startswith("Transfer to another dataset or model: no other") for line in report.not_supported)


class Averages(Scored):
    """A matrix of which the averages are given as (value, low, high)."""

    def __init__(self, within, transferred):
        self.matrix, self.names = SimpleNamespace(axis="layer"), ["layer 1", "layer 2"]
        self.given = {"within": within, "transferred": transferred}

    transferred = property(lambda self: self.made("transferred"))
    within = property(lambda self: self.made("within"))
    best_carried = property(lambda self: ("length", Estimate(0.5, np.full(100, 0.5))))
    crossed = property(lambda self: [(0, 1), (1, 0)])

    def made(self, name):
        value, low, high = self.given[name]
        return Estimate(value, np.linspace(low, high, 100))

    def auroc(self, i, j):
        return self.made("transferred")


@pytest.mark.parametrize(
    ("within", "transferred", "said"),
    [
        ((0.9, 0.88, 0.92), (0.5, 0.45, 0.55), "does not transfer: not told from chance"),
        ((0.7, 0.6, 0.8), (0.62, 0.45, 0.75), "is not shown to transfer: not told from chance"),  # wide enough to hold it
        ((0.51, 0.45, 0.57), (0.5, 0.44, 0.56), "has nothing to transfer"),
        ((0.9, 0.88, 0.92), (0.3, 0.25, 0.35), "its scores point the other way"),
        ((0.9, 0.88, 0.92), (0.6, 0.55, 0.65), "hardly transfers"),
        ((0.9, 0.88, 0.92), (0.85, 0.82, 0.88), "transfers at a loss of"),
        ((0.9, 0.88, 0.92), (0.9, 0.85, 0.95), "transfers without a measurable loss"),
    ],
)
def test_no_transfer_is_said_only_where_the_interval_says_so(within, transferred, said):
    assert said in Averages(within, transferred).sentence()


def test_every_row_has_its_controls_on_the_same_traces(run):
    *_, report = run
    entries = [row for row in report.rows if row.name.startswith("difficulty") and row.metric == "auroc"]
    assert len(entries) == 4
    for row in entries:
        assert [c.name for c in row.controls] == ["majority", "length", "logprob", "layer_0", "permuted_labels"]
        best = max(c.value for c in row.controls[:3])
        assert row.gain.value == pytest.approx(row.value - best, abs=1e-5) and row.gain.low < row.gain.value < row.gain.high
    pairs = [row for row in report.rows if row.metric == "within_problem_pairs"]
    for row in pairs:
        null = {c.name: c for c in row.controls}["permuted_labels"]
        assert null.low <= 0.5 <= null.high


def test_a_copy_of_the_experiment_gives_the_diagonal_so_shared_problems_are_never_seen(world, tmp_path):
    transfer = Transfer("made", opened(world), {"copy": opened(world)}, PLACE, permutations=0)
    matrix = transfer.matrices[-1]
    parts = tmp_path / "parts"
    parts.mkdir()
    arrays = read_part(transfer.fit_row(matrix, matrix.kinds[0], parts / "row"), parts)
    assert (matrix.axis, transfer.shared_problems) == ("experiment", {"copy": 60})
    np.testing.assert_allclose(arrays["probe.1"], arrays["probe.0"], rtol=0, atol=1e-12)
    rows = [transfer.rows(matrix, kind)[0] for kind in matrix.kinds]
    np.testing.assert_array_equal(rows[0].folds, rows[1].folds)


def test_a_problem_of_two_experiments_lies_in_one_fold_though_each_had_folds_of_its_own(world, tmp_path):
    other = opened(make_world(tmp_path / "other", seed=1))
    transfer = Transfer("made", opened(world), {"other": other}, PLACE, permutations=0)
    matrix = transfer.matrices[-1]
    fold_of = {}
    for kind in matrix.kinds:
        rows, _ = transfer.rows(matrix, kind)
        problems = [transfer.training(kind).table.problems[trace] for trace in rows.trace]
        for problem, fold in zip(problems, rows.folds.tolist()):
            assert fold_of.setdefault(problem, fold) == fold
    own, theirs = (dict(zip(training.table.problems, training.folds.tolist())) for training in (transfer.own, other))
    assert own != theirs, "or nothing was tested"


def test_problems_are_the_same_by_id_or_by_question():
    keys = [("a", "1+1"), ("b", "2+2"), ("x", "1+1"), ("b", "9+9"), ("y", "9+9"), ("c", "3+3")]
    assert same_problems(keys).tolist() == [0, 1, 0, 1, 1, 2]


def test_another_width_or_a_missing_layer_is_refused_by_name(world, tmp_path):
    other = make_world(tmp_path / "other", poolings=["mean"])
    path = other.activations / "activations.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "d_model": 16}))
    with pytest.raises(DataError, match="the model of 'other' is 16 wide and this one's 12; a direction of one cannot be applied"):
        Transfer("made", opened(world), {"other": opened(other)}, PLACE, permutations=0)
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match="'other' has no usable rows of layer 1, sentence; it has layers 0, 1 and poolings mean"):
        Transfer("made", opened(world), {"other": opened(other)}, Place(layer=1, pooling="sentence"), permutations=0)
    with pytest.raises(DataError, match="no usable rows of layer 7, mean; there are layers 0, 1"):
        Transfer("made", opened(world), {}, Place(layer=7, pooling="mean"), permutations=0)
    shutil.rmtree(tmp_path / "other")
