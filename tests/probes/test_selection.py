"""Best of N against a reference that tries every subset, and a verdict that says what the numbers say."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit

from tests.probes.helpers import train
from tribunal.core.errors import DataError
from tribunal.core.records import TraceLabel
from tribunal.core.work import Never
from tribunal.probes.held_out import read_held_out
from tribunal.probes.selection import NO_ANSWER, RIGHT, Candidates, Sample, curves, number_answers, picks, subsets_of
from tribunal.probes.selection_report import Selection

NAN = float("nan")
SAMPLES = [
    Sample(1, 0.4, -0.1, 9),
    Sample(RIGHT, 1.5, -0.3, 5),
    Sample(2, 1.5, -0.2, 5),  # tied with the one before, by probe and by length
    Sample(1, -0.6, -0.5, 7),
    Sample(RIGHT, -2.0, -0.2, 8),  # tied with the third, by log-probability
    Sample(NO_ANSWER, NAN, -0.01, 1),
]


def by_hand(samples, n):
    """Mean over every subset of n; ties are shared by counting each of the best."""
    found = {name: [] for name in ("random_choice", "best_possible", "probe", "logprob", "length", "majority_vote", "probe_vote")}
    for subset in combinations(samples, n):
        found["random_choice"].append(np.mean([s.answer == RIGHT for s in subset]))
        found["best_possible"].append(any(s.answer == RIGHT for s in subset))
        answered = [s for s in subset if s.answer != NO_ANSWER]
        for name, score in (("probe", lambda s: s.probe), ("logprob", lambda s: s.logprob), ("length", lambda s: -s.length)):
            best = [s.answer == RIGHT for s in answered if score(s) == max(map(score, answered))]
            found[name].append(np.mean(best) if best else 0)
        for name, weight in (("majority_vote", lambda s: 1.0), ("probe_vote", lambda s: expit(s.probe))):
            votes = {}
            for s in answered:
                votes[s.answer] = votes.get(s.answer, 0) + weight(s)
            best = [answer == RIGHT for answer, vote in votes.items() if vote == max(votes.values())]
            found[name].append(np.mean(best) if best else 0)
    return {name: np.mean(values) for name, values in found.items()}


def test_every_selector_is_its_mean_over_all_subsets():
    found = curves(SAMPLES, range(1, 7), 20_000, seed=0)
    for n in range(1, 7):
        for name, value in by_hand(SAMPLES, n).items():
            assert found[name][n - 1] == pytest.approx(value, abs=1e-12), (name, n)


def test_a_vote_over_drawn_subsets_is_near_the_one_over_all_and_the_same_each_time():
    rng = np.random.default_rng(0)
    samples = [Sample(int(a), float(p), None, 3) for a, p in zip(rng.integers(0, 4, 12), rng.standard_normal(12))]
    drawn, every = (curves(samples, [6], most, seed=0) for most in (600, 1000))
    assert len(subsets_of(12, 6, 600, 0)) == 600 and len(subsets_of(12, 6, 1000, 0)) == 924
    assert (subsets_of(12, 6, 600, 0).sum(1) == 6).all()
    for name in ("majority_vote", "probe_vote"):
        assert 0 < abs(drawn[name][0] - every[name][0]) < 0.06
        assert curves(samples, [6], 600, seed=0)[name] == drawn[name]
    assert "logprob" not in drawn


def test_a_pick_is_the_first_of_the_best_and_nothing_is_picked_where_nothing_is_answered():
    assert picks(SAMPLES) == {"probe": 1, "logprob": 0, "length": 1, "majority_vote": 0, "probe_vote": 0}
    assert set(picks([Sample(NO_ANSWER, NAN, -1.0, 1)] * 2).values()) == {0}


def test_answers_that_are_equal_share_a_number_and_traces_without_one_have_none():
    given = [("incorrect", "7"), ("correct", "1/2"), ("incorrect", "7.0"), ("truncated", "7"), ("correct", "0.5"), ("incorrect", "8")]
    given.append(("unparsable", None))
    labels = [
        TraceLabel(problem_id="p", sample=i, verdict=verdict, answer=answer, gold="0.5", stratum=None, sentences=[])
        for i, (verdict, answer) in enumerate(given)
    ]
    assert number_answers(labels) == [1, RIGHT, 1, NO_ANSWER, RIGHT, 2, NO_ANSWER]


def selection(probe_of, n_problems=60, imported=()):
    """Problems of four samples, right half of the time, wrong ones all alike, with a noisy log-probability."""
    rng = np.random.default_rng(0)
    records = {}
    for problem in range(n_problems):
        right = rng.random(4) < 0.5
        logprobs = np.where(right, 0.0, -1.0) + rng.standard_normal(4)
        samples = [Sample(RIGHT if r else 1, probe_of(r, v), None if problem in imported else float(v), 3) for r, v in zip(right, logprobs)]
        facts = {"stratum": None, "samples": 4, "right": int(right.sum()), "answered": 4}
        records[f"p{problem}"] = {**facts, "curves": curves(samples, [1, 2, 3, 4], 100, 0), "picks": picks(samples)}
    stub = SimpleNamespace(problems=list(records), sizes=[1, 2, 3, 4], n=4, seed=0, subsets=100, left_out={})
    return Selection(stub, records, resamples=200)


def test_a_probe_that_says_what_the_log_probability_says_is_called_no_better():
    same = selection(lambda right, logprob: float(logprob))
    assert "no better than logprob (" in same.verdict(planted=False) and "planted" not in same.verdict(planted=False)
    test = next(test for test in same.exact_tests() if test["against"] == "logprob" and "best of N" in test["selector"])
    assert (test["only_ours_right"], test["only_theirs_right"], test["p"]) == (0, 0, 1.0)
    assert all(line.startswith("A difference between difficulties") for line in same.not_supported(planted=False) if "stratum" in line)


def test_a_probe_that_knows_is_better_and_one_that_is_wrong_is_worse():
    knows, wrong = selection(lambda right, _: 9.0 if right else -9.0), selection(lambda right, _: -9.0 if right else 9.0)
    assert "better than the best control, logprob" in knows.verdict(planted=False)
    assert knows.estimate("probe", 4).value == knows.estimate("best_possible", 4).value
    assert "worse than" in wrong.verdict(planted=True) and "planted" in wrong.verdict(planted=True)


def test_a_few_problems_carry_no_verdict_however_clear_they_are():
    one = selection(lambda right, _: 9.0 if right else -9.0, n_problems=1)
    assert "better" not in one.verdict(planted=False).replace("too few problems to say which is better", "")
    assert "too few problems to say" in one.verdict(planted=False)


@pytest.mark.parametrize("imported", [[0], [1]])
def test_log_probabilities_that_only_some_problems_have_are_no_rival(imported):
    some = selection(lambda right, _: 9.0 if right else -9.0, imported=imported)
    assert "logprob" not in some.rivals and {test["against"] for test in some.exact_tests()} == {"majority_vote", "length"}
    assert "A comparison with logprob: these traces carry no log-probabilities." in some.not_supported(planted=False)


@pytest.fixture(scope="module")
def probes(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("selection") / "train_probes"
    train(world, out, kinds=["logistic"], permutations=0, random_directions=0)
    return read_held_out(out)


def test_a_truncated_trace_is_wrong_without_a_vote_and_random_choice_may_take_it(world, probes):
    candidates = Candidates(traces=world.traces, labels=world.labelled, held_out=probes, n=None, subsets=100, seed=0)
    (record,) = next(candidates.measure(["p0"], Never())).values()
    right = int(world.labels[1:4].sum())
    assert (record["samples"], record["answered"], record["right"]) == (4, 3, right)
    assert record["curves"]["random_choice"] == [right / 4] * 4
    assert record["curves"]["probe"][0] == pytest.approx(right / 4)


def test_the_scores_are_of_the_cell_that_was_chosen_without_the_problem(world, probes):
    """Chosen scores that rank a problem's samples the other way round turn best-of-N round; the headline's own logits play no part."""
    folders = {"traces": world.traces, "labels": world.labelled, "n": None, "subsets": 100, "seed": 0}
    turned = replace(probes, nested_logit={key: -value for key, value in probes.nested_logit.items()})
    unused = replace(probes, logit={key: -value for key, value in probes.logit.items()})
    plain, other, same = (
        next(Candidates(**folders, held_out=given).measure([f"p{i}" for i in range(60)], Never())) for given in (probes, turned, unused)
    )
    mean = [np.mean([record["curves"]["probe"][-1] for record in records.values()]) for records in (plain, other)]
    assert plain == same and mean[0] > mean[1] + 0.1


def test_too_few_samples_and_labels_that_differ_are_refused_in_one_line(world, probes, tmp_path):
    folders = {"traces": world.traces, "labels": world.labelled, "held_out": probes}
    with pytest.raises(DataError, match=r"0 have 5 samples .* or lower select_answers.n \(5\)"):
        Candidates(**folders, n=5, subsets=100, seed=0)
    text = (world.labelled / "labels.jsonl").read_text()
    (tmp_path / "labels.jsonl").write_text(text.replace('"verdict":"correct"', '"verdict":"incorrect"', 1))
    with pytest.raises(DataError, match=r"was correct for the probes and is incorrect in .*; run train_probes again") as error:
        Candidates(**{**folders, "labels": tmp_path}, n=None, subsets=100, seed=0)
    assert "\n" not in str(error.value)
