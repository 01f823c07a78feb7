"""What a score has seen: never its own problem, and never for a choice made about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tribunal.core import stats
from tribunal.probes.crossfit import KINDS, Rows, cross_fit, make_folds

CS = [0.01, 1.0]


def small(n_problems: int = 40, per: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    problems = np.repeat(np.arange(n_problems), 4)
    labels = rng.integers(0, 2, len(problems))
    folds = make_folds(labels, [f"p{p}" for p in problems], 4, seed)
    rows = Rows.of(np.repeat(np.arange(len(problems)), per), labels, folds, problems)
    acts = rng.standard_normal((len(rows.trace), 6)) + rows.labels[:, None] * 0.5
    return torch.tensor(acts), rows


def test_all_traces_of_a_problem_are_in_one_fold_and_the_seed_decides_the_folds():
    _, rows = small()
    assert all(len(set(rows.folds[rows.problems == p])) == 1 for p in range(40))
    again = make_folds(rows.labels, [f"p{p}" for p in rows.problems], 4, 0)
    assert (again == rows.folds).all()
    assert not (make_folds(rows.labels, [f"p{p}" for p in rows.problems], 4, 1) == rows.folds).all()


def test_out_of_fold_logits_are_those_of_sklearn_fitted_without_the_fold():
    acts, rows = small()
    fit = cross_fit(acts, rows, CS).fits["logistic"]
    for k in range(4):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=fit.c_of_fold[k], tol=1e-10, solver="newton-cg"))
        pipeline.fit(acts[rows.folds != k].numpy(), rows.labels[rows.folds != k])
        held_out = rows.folds == k
        np.testing.assert_allclose(fit.logits[held_out], pipeline.decision_function(acts[held_out].numpy()), atol=1e-5)


def test_a_fold_is_not_seen_by_the_choices_made_for_it():
    acts, rows = small()
    plain = cross_fit(acts, rows, CS, KINDS)
    changed = acts.clone()
    changed[rows.folds == 2] += 100 * torch.randn(
        int((rows.folds == 2).sum()), 6, generator=torch.Generator().manual_seed(0), dtype=acts.dtype
    )
    other = cross_fit(changed, rows, CS, KINDS)
    for kind in KINDS:
        assert plain.fits[kind].inner_auroc[2] == other.fits[kind].inner_auroc[2]
        assert plain.fits[kind].c_of_fold[2:3] == other.fits[kind].c_of_fold[2:3]
        assert plain.fits[kind].inner_auroc[1] != other.fits[kind].inner_auroc[1]


def test_the_final_vector_is_the_fit_on_all_rows_in_raw_units():
    acts, rows = small()
    fit = cross_fit(acts, rows, CS).fits["logistic"]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=fit.c, tol=1e-10, solver="newton-cg")).fit(acts.numpy(), rows.labels)
    np.testing.assert_allclose(acts.numpy() @ fit.vector + fit.bias, pipeline.decision_function(acts.numpy()), atol=1e-5)


def test_many_rows_of_one_trace_count_as_one():
    acts, rows = small()
    repeated, five = acts.repeat_interleave(5, 0), Rows.of(np.repeat(rows.trace, 5), rows.labels, rows.folds, rows.problems)
    once, often = cross_fit(acts, rows, CS, KINDS), cross_fit(repeated, five, CS, KINDS)
    for kind in KINDS:
        np.testing.assert_allclose(often.fits[kind].logits[::5], once.fits[kind].logits, atol=1e-4)
        np.testing.assert_allclose(often.fits[kind].vector, once.fits[kind].vector, atol=1e-4)


def test_probabilities_of_ridge_and_difference_of_means_are_calibrated_on_scores_they_did_not_fit():
    acts, rows = small(n_problems=250)
    for kind, fit in cross_fit(acts, rows, CS, KINDS).fits.items():
        assert stats.ece(fit.logits, rows.labels, np.ones((1, len(rows.labels))))[0] < 0.06, kind


def test_labels_permuted_within_problems_leave_pairs_at_chance_and_signal_stands_out():
    acts, rows = small(n_problems=80)
    permutations = stats.permute_within(rows.problems, 100, seed=0)
    fit = cross_fit(acts, rows, CS, KINDS, permutations_PN=permutations, random_directions=30)
    assert fit.null_pairs.mean() == pytest.approx(0.5, abs=0.03)
    assert stats.permutation_p(fit.ridge_pairs, fit.null_pairs) == pytest.approx(1 / 101)
    assert fit.ridge_auroc == pytest.approx(roc_auc_score(rows.labels, fit.fits["ridge"].logits), abs=0.02)
    assert fit.random_auroc.mean() < fit.ridge_auroc


def test_random_directions_are_at_chance_where_there_is_no_signal():
    rng = np.random.default_rng(0)
    _, rows = small(n_problems=200)
    fit = cross_fit(torch.tensor(rng.standard_normal((800, 30))), rows, CS, random_directions=50)
    assert fit.random_auroc.mean() == pytest.approx(0.5, abs=0.03)
