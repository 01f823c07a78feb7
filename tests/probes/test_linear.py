"""The solver against scikit-learn's converged fits, in both of its spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tribunal.probes.linear import TrainingSet, fit_platt

CS = [0.01, 1.0, 30.0]


def data(n: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    acts = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + rng.standard_normal(d) * 5
    labels = (acts[:, 0] / acts[:, 0].std() + acts[:, 1] / acts[:, 1].std() + rng.standard_normal(n) * 2 > 0.3).astype(int)
    return acts, labels, rng.uniform(0.2, 1.0, n)


SHAPES = pytest.mark.parametrize("shape", [(300, 20), (60, 150)], ids=["more rows than features", "fewer rows than features"])


@SHAPES
def test_logistic_gives_the_logits_of_the_converged_sklearn_pipeline_for_every_c(shape):
    acts, labels, weights = data(*shape)
    fit = TrainingSet(torch.tensor(acts), torch.tensor(weights)).logistic(torch.tensor(labels), CS)
    assert fit.last_move <= 1e-6
    new, *_ = data(50, shape[1], seed=1)
    ours = fit.scores(torch.tensor(new)).numpy()
    for column, c in enumerate(CS):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-12, solver="newton-cg", max_iter=1000))
        pipeline.fit(acts, labels, standardscaler__sample_weight=weights, logisticregression__sample_weight=weights)
        np.testing.assert_allclose(ours[:, column], pipeline.decision_function(new), atol=2e-5, rtol=1e-5)


@SHAPES
def test_ridge_is_sklearn_ridge_on_targets_of_plus_and_minus_two(shape):
    acts, labels, _ = data(*shape)
    ours = TrainingSet(torch.tensor(acts)).ridge(torch.tensor(labels)[:, None], 0.5)
    peer = make_pipeline(StandardScaler(), Ridge(alpha=4 / 0.5)).fit(acts, 4 * labels - 2)
    np.testing.assert_allclose(ours.scores(torch.tensor(acts))[:, 0], peer.predict(acts), atol=1e-8)


def test_permuted_columns_of_ridge_are_the_fits_one_by_one():
    acts, labels, _ = data(80, 200)
    rng = np.random.default_rng(0)
    columns = torch.tensor(np.stack([rng.permutation(labels) for _ in range(5)], 1))
    training = TrainingSet(torch.tensor(acts))
    together = training.ridge(columns, 0.1)
    for i in range(5):
        alone = TrainingSet(torch.tensor(acts)).ridge(columns[:, i : i + 1], 0.1)
        np.testing.assert_allclose(together.vectors[:, i], alone.vectors[:, 0], atol=1e-10)


def test_a_weight_of_two_is_the_row_written_twice():
    acts, labels, _ = data(40, 5)
    twice = np.r_[np.arange(40), np.arange(10)]
    weights = torch.tensor(np.r_[np.full(10, 2.0), np.ones(30)])
    weighted = TrainingSet(torch.tensor(acts), weights).logistic(torch.tensor(labels), [1.0])
    written = TrainingSet(torch.tensor(acts[twice])).logistic(torch.tensor(labels[twice]), [1.0])
    np.testing.assert_allclose(weighted.vectors, written.vectors, atol=1e-7)


def test_difference_of_means_points_from_wrong_to_right_and_splits_at_the_midpoint():
    acts, labels, _ = data(200, 10)
    fit = TrainingSet(torch.tensor(acts)).diff_of_means(torch.tensor(labels))
    means = np.stack([acts[labels == label].mean(0) for label in (0, 1)])
    scores = fit.scores(torch.tensor(means))[:, 0]
    assert scores[1] > 0 > scores[0]
    assert scores[1] == pytest.approx(-scores[0])
    expected = (means[1] - means[0]) / acts.var(0)
    assert np.corrcoef(expected, fit.vectors[:, 0])[0, 1] == pytest.approx(1.0)


@SHAPES
def test_a_constant_feature_gets_no_weight(shape):
    acts, labels, _ = data(*shape)
    acts[:, 7] = 0.1
    fit = TrainingSet(torch.tensor(acts)).logistic(torch.tensor(labels), [1.0])
    assert abs(float(fit.vectors[7, 0])) < 1e-9


@SHAPES
def test_separable_classes_and_a_weak_penalty_still_converge(shape):
    acts, _, _ = data(*shape)
    labels = (acts[:, 0] > acts[:, 0].mean()).astype(int)
    fit = TrainingSet(torch.tensor(acts)).logistic(torch.tensor(labels), [0.001, 1e4])
    assert fit.last_move <= 1e-6
    assert ((fit.scores(torch.tensor(acts))[:, 1].numpy() > 0) == labels).all()


def test_platt_recovers_the_logits_that_made_the_labels():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-(3 * scores - 1)))
    slope, offset = fit_platt(torch.tensor(scores), torch.tensor(labels.astype(int)))
    assert slope == pytest.approx(3, abs=0.15)
    assert offset == pytest.approx(-1, abs=0.1)
