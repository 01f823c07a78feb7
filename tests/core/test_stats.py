"""Metrics and intervals against independent references."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics as sk

from tribunal.core import stats


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    logits = np.round(rng.standard_normal(300) + labels, 1)  # rounding makes ties
    return logits, labels, rng.integers(0, 4, (5, 300)).astype(float)


def test_metrics_equal_scikit_learn_with_weights_and_ties(data):
    logits, labels, weights = data
    for i, row in enumerate(weights):
        assert stats.auroc(logits, labels, weights)[i] == pytest.approx(sk.roc_auc_score(labels, logits, sample_weight=row))
        assert stats.accuracy(logits, labels, weights)[i] == pytest.approx(sk.accuracy_score(labels, logits >= 0, sample_weight=row))
        balanced = sk.balanced_accuracy_score(labels, logits >= 0, sample_weight=row)
        assert stats.balanced_accuracy(logits, labels, weights)[i] == pytest.approx(balanced)
        assert stats.brier(logits, labels, weights)[i] == pytest.approx(sk.brier_score_loss(labels, expit(logits), sample_weight=row))


def test_ece_is_the_mean_gap_over_equal_bins_where_there_are_no_ties():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal(200)
    labels = rng.integers(0, 2, 200)
    order = np.argsort(logits)
    gaps = [abs(expit(logits[rows]).mean() - labels[rows].mean()) for rows in np.split(order, 10)]
    assert stats.ece(logits, labels, np.ones((1, 200)))[0] == pytest.approx(np.mean(gaps))


def test_ece_counts_a_probability_of_exactly_one():
    logits = np.full(10, 800.0)  # expit gives exactly 1.0
    assert stats.ece(logits, np.zeros(10, int), np.ones((1, 10)))[0] == 1.0


def test_a_weight_of_two_is_the_row_written_twice(data):
    logits, labels, weights = data
    rows = np.repeat(np.arange(300), weights[0].astype(int))
    for name, metric in stats.METRICS.items():
        one = metric(logits, labels, weights[:1])[0]
        assert one == pytest.approx(metric(logits[rows], labels[rows], np.ones((1, len(rows))))[0]), name


def test_bootstrap_draws_are_those_of_redrawing_whole_problems(data):
    logits, labels, _ = data
    problems = [f"p{i // 3}" for i in range(300)]
    resamples = stats.Resamples(problems, 20, seed=3)
    estimate = resamples.estimate(stats.auroc, logits, labels, resamples.index(problems))
    for draw, counts in zip(estimate.draws, resamples.counts_RG):
        rows = [row for problem in range(100) for row in [3 * problem, 3 * problem + 1, 3 * problem + 2] * int(counts[problem])]
        assert draw == pytest.approx(sk.roc_auc_score(labels[rows], logits[rows]))


def test_the_interval_covers_the_truth_about_95_times_in_100_although_rows_of_a_problem_are_alike():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        labels = np.repeat(rng.integers(0, 2, 60), 4)
        problems = np.repeat(np.arange(60), 4)
        right = np.repeat(rng.random(60) < 0.7, 4)
        logits = np.where(right == (labels == 1), 1.0, -1.0)
        resamples = stats.Resamples(list(problems), 200, seed=trial)
        low, high = resamples.estimate(stats.accuracy, logits, labels, problems).interval
        covered += low <= 0.7 <= high
    assert 176 <= covered <= 199


def test_a_difference_with_itself_is_zero_in_every_draw(data):
    logits, labels, _ = data
    resamples = stats.Resamples(range(300), 50, seed=0)
    one, two = (resamples.estimate(stats.auroc, logits, labels, np.arange(300)) for _ in range(2))
    assert one.minus(two).interval == (0.0, 0.0)


def test_within_problem_pairs_ignore_difficulty():
    problems = np.repeat(np.arange(50), 4)
    labels = np.tile([1, 1, 0, 0], 50)
    difficulty = np.repeat(np.random.default_rng(0).standard_normal(50), 4) * 100
    resamples = stats.Resamples(list(problems), 50, seed=0)
    assert resamples.pairs(difficulty, labels, problems).value == 0.5
    assert resamples.pairs(difficulty + labels, labels, problems).value == 1.0


def test_permutations_keep_every_row_in_its_problem():
    problems = np.array([0, 1, 0, 2, 1, 0])
    permutations = stats.permute_within(problems, 50, seed=0)
    assert all(sorted(row) == list(range(6)) for row in permutations.tolist())
    assert (problems[permutations] == problems).all()
    assert len({tuple(row) for row in permutations.tolist()}) > 5


def test_one_class_gives_no_number_and_does_not_fail():
    resamples = stats.Resamples(range(5), 10, seed=0)
    estimate = resamples.estimate(stats.auroc, np.arange(5.0), np.ones(5, int), np.arange(5))
    assert not estimate.known
