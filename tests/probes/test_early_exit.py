"""Giving up on samples: costs and answers worked out by hand, and thresholds that never see the problems they are judged on."""

from __future__ import annotations

import numpy as np
import pytest

from tribunal.probes.early_exit import AT_THE_END, MONITOR, RANDOM, EarlyExit, Sample, at_random, by_threshold, in_turn


def sample(right: bool, scores: list[float], looks: list[int], answered: bool = True) -> Sample:
    return Sample(right, answered, np.array(looks), {MONITOR: np.array(scores)})


WRONG = sample(False, [0.4, -1.0, 2.0], [10, 20, 30])
RIGHT = sample(True, [0.5, 1.0, 1.5], [8, 16, 40])


def test_a_sample_is_abandoned_at_its_first_look_below_the_threshold_and_costs_what_was_drawn_by_then():
    thresholds = np.array([-2.0, 0.0, 0.45, 3.0])
    accepted, cost = by_threshold(WRONG, WRONG.scores[MONITOR], thresholds)
    assert accepted.tolist() == [1, 0, 0, 0] and cost.tolist() == [30, 20, 10, 10]
    accepted, cost = by_threshold(RIGHT, RIGHT.scores[MONITOR], thresholds)
    assert accepted.tolist() == [1, 1, 1, 0] and cost.tolist() == [40, 40, 40, 8]


def test_samples_are_drawn_in_turn_and_the_last_one_answers_whatever_its_score():
    thresholds = np.array([-2.0, 0.0, 3.0])
    tokens, right = in_turn([WRONG, RIGHT], [by_threshold(s, s.scores[MONITOR], thresholds) for s in (WRONG, RIGHT)])
    # never: the first one answers; 0: the wrong one is left after 20 tokens, the right one answers for 40; 3: both are left
    assert tokens.tolist() == [(30 + 40) / 2, (20 + 40 + 40) / 2, (10 + 40 + 8 + 30) / 2]
    assert right.tolist() == [0.5, 1.0, 0.5]


def test_a_sample_without_an_answer_is_never_accepted_while_others_are_left():
    cut = sample(False, [5.0], [50], answered=False)
    thresholds = np.array([0.0])
    tokens, right = in_turn([cut, RIGHT], [by_threshold(s, s.scores[MONITOR], thresholds) for s in (cut, RIGHT)])
    assert right.tolist() == [1.0] and tokens.tolist() == [(50 + 40 + 40) / 2]


def test_random_exit_is_the_expectation_over_its_draws():
    hazards = np.array([0.0, 0.3, 1.0])
    accepted, cost = at_random(WRONG, hazards)
    rng = np.random.default_rng(0)
    for place, hazard in enumerate(hazards):
        gone = rng.random((200_000, 3)) < hazard
        first = np.where(gone.any(1), gone.argmax(1), 2)
        assert accepted[place] == pytest.approx((~gone.any(1)).mean(), abs=5e-3)
        assert cost[place] == pytest.approx(WRONG.looks_S[first].mean(), abs=0.05)


def world(telling: float, problems: int = 60) -> EarlyExit:
    """Half of the samples are right; the score tells by ``telling`` standard deviations, from the first of two looks on."""
    rng = np.random.default_rng(1)
    groups = []
    for _ in range(problems):
        rights = rng.permutation([True, True, False, False])
        noise = rng.standard_normal((4, 2))
        groups.append([sample(bool(r), (telling * (2 * r - 1) + noise[i]).tolist(), [20, 100]) for i, r in enumerate(rights)])
    names = [f"p{i}" for i in range(problems)]
    return EarlyExit(names, groups, np.arange(problems) % 3, [MONITOR], resamples=200, seed=0)


def test_a_telling_score_answers_better_for_the_same_tokens_and_saves_tokens_for_the_same_accuracy():
    early = world(2.0)
    monitor, at_end, by_chance = (early.within_budget(name, 1.3) for name in (MONITOR, AT_THE_END, RANDOM))
    assert monitor.right_P.mean() > 0.9 and at_end.right_P.mean() < 0.8 and by_chance.right_P.mean() == pytest.approx(0.5)
    for chosen in (monitor, at_end, by_chance):
        assert early.share(chosen.tokens_P).value < 1.4
    reference = early.judged_at_the_end(0.0)
    equal = early.as_right_as(MONITOR, reference)
    assert equal.tokens_P.sum() < 0.85 * reference.tokens_P.sum() and equal.right_P.mean() >= reference.right_P.mean() - 0.02


def test_a_score_that_tells_nothing_falls_back_to_the_reference_and_saves_nothing():
    early, telling = world(0.0), world(2.0)
    reference = telling.judged_at_the_end(0.0)
    equal = early.as_right_as(MONITOR, reference)
    assert equal.threshold_of_fold == {} and np.array_equal(equal.tokens_P, reference.tokens_P)


def test_a_folds_threshold_does_not_depend_on_its_own_outcomes():
    early = world(1.0)
    before = early.within_budget(MONITOR, 1.5).threshold_of_fold
    curve = early.curves[MONITOR]
    curve.right_PT[early.folds == 0] = np.linspace(1, 0, curve.right_PT.shape[1])
    after = early.within_budget(MONITOR, 1.5).threshold_of_fold
    assert after[0] == before[0] and after[1] != before[1]
