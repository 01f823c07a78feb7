"""Importance of sentences by suppression and by rollouts, answers tracked, and tiers that are balanced."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.oracle.helpers import BUILTIN, addition, made
from tests.resume import StopAfter
from tests.traces.helpers import decode
from tribunal.core.work import Never
from tribunal.models.generation import Finished
from tribunal.models.loading import load_model
from tribunal.models.suppression import Suppression
from tribunal.traces.importance import AnswerTracker, Rollouts, by_suppression, effect, quantile_names, total_variation, within_groups
from tribunal.traces.sentence_labels import TIERS, RolloutSettings, beyond_chance
from tribunal.traces.sentences import TokenOffsets


def test_a_step_of_a_written_sum_matters_to_what_follows_and_the_last_sentence_to_nothing():
    trace, label, _ = addition(3471, 2853)
    values = by_suppression(Suppression(load_model(BUILTIN).model), trace, label)
    assert len(values) == len(label.sentences) == 5
    assert all(value is not None and value.importance > 0.01 for value in values[:4]) and values[4] is None
    assert all(value.by_chance <= 1e-6 and value.p is None for value in values[:4]), "beside what rounding alone makes"


def test_rollouts_find_the_step_at_which_the_answer_is_decided():
    slipped = "7+5=12 write 2 carry 1 | 4+8+1=13 write 9 carry 1 | 3+2+1=6 write 6</think>\nAnswer: 692<sep>n<eos>"
    trace, label, problem = addition(347, 285, 1, slipped)
    loaded = load_model(BUILTIN)
    settings = RolloutSettings(samples=3, max_new_tokens=60, slots=12, temperature=0.05)
    values = Rollouts(loaded, settings, seed=0).measure(trace, label, problem, Never())
    assert values is not None
    importance, by_chance, p = values[1]
    assert importance == 1.0  # before the slip all answers are 632, behind it 692
    assert by_chance == pytest.approx(0.4, abs=0.02)  # three and three dealt out: 2 of 20 deals part them, 18 give a third
    assert p == pytest.approx(2 / 20, abs=0.01)
    assert values[0] == values[2] == (0.0, 0.0, 1.0) and values[3] is None
    assert values == Rollouts(loaded, settings, seed=0).measure(trace, label, problem, Never())
    assert Rollouts(loaded, settings, seed=0).measure(trace, label, problem, StopAfter(3)) is None


def test_total_variation_is_the_share_of_answers_that_would_have_to_move():
    assert total_variation(Counter("aab"), Counter("aab")) == 0.0
    assert total_variation(Counter("aaaa"), Counter("b")) == 1.0
    assert total_variation(Counter("aabb"), Counter("aaab")) == pytest.approx(0.25)


def test_of_traces_without_any_effect_few_are_ranked_and_a_sentence_that_decides_the_answer_is_found():
    rng = np.random.default_rng(0)
    noise = [[Counter(rng.choice(list("abc"), 10).tolist()) for _ in range(9)] for _ in range(60)]  # nine places, no effect
    effects = [[effect(before, after, rng) for before, after in pairwise(places)] for places in noise]
    assert 0.17 < np.mean([e.importance for trace in effects for e in trace]) < 0.3  # what tiers would rank
    assert np.mean([e.importance for trace in effects for e in trace]) == pytest.approx(
        np.mean([e.by_chance for trace in effects for e in trace]), abs=0.02
    )
    assert sum(beyond_chance([e.p for e in trace]) for trace in effects) <= 6
    decided = [Counter("aaaaaaaabc")] * 4 + [Counter("bbbbbbbbbc")] * 5
    assert beyond_chance([effect(before, after, rng).p for before, after in pairwise(decided)])
    assert beyond_chance([None, None]), "suppression leaves nothing to chance"


def test_a_decisive_sentence_passes_however_many_sentences_its_trace_has():
    decided = Counter("a" * 20), Counter("b" * 20)
    for count in (100, 501, 3000):
        p = effect(*decided, np.random.default_rng(0), count).p
        assert beyond_chance([p] + [1.0] * (count - 1))
    weak = Counter("a" * 12 + "b" * 8), Counter("a" * 8 + "b" * 12)
    one, many = (effect(*weak, np.random.default_rng(0), count) for count in (1, 3000))
    assert one == many, "what chance explains is settled by the first shuffles"


class SameRollouts(Rollouts):
    """From every place the same answers, without a model: measures differ by their shuffles alone."""

    def __init__(self, seed: int) -> None:
        self.loaded, self.settings, self.seed, self.sampler = None, RolloutSettings(samples=20, max_new_tokens=1, slots=1), seed, self

    def run(self, requests, stop, state):
        yield [Finished(request.key, [int(request.key.partition("/")[2])], [0.0], "stop", False) for request in requests]

    def _answer(self, trace, cut, finished, problem):
        return str(finished.tokens[0] % 3)


def test_shuffles_depend_on_the_trace_the_place_and_the_seed_alone():
    def by_chance(seed: int = 0, sample: int = 0, sentences: int = 5) -> list[float]:
        trace, label, problem = made([f"Step {n} is written." for n in range(sentences)], sample=sample)
        return [found.by_chance for found in SameRollouts(seed).measure(trace, label, problem, Never())]

    known = by_chance()
    assert known == by_chance() and known[:3] == by_chance(sentences=3), "neither on what else was measured"
    assert len({*known, *by_chance(seed=1), *by_chance(sample=1)}) == 15
    same = [effect(Counter("aab"), Counter("abb"), np.random.default_rng(3)) for _ in range(2)]
    assert same[0] == same[1] == effect({"b": 1, "a": 2}, {"b": 2, "a": 1}, np.random.default_rng(3))


def test_sentences_behind_the_first_statement_of_the_answer_are_not_tracked_though_it_is_stated_again_later():
    story = ["Half of 48 is 24.", "A sum gives 72 clips.", "Wait, check: 48 + 24 is 72.", "The answer is 72."]
    trace, label, problem = made(story)
    values = TrackedCharacters().logprobs(trace, label, problem)
    assert values == [0.0, None, None, None]


def test_a_choices_letter_counts_where_it_is_chosen_and_not_where_it_is_a_word():
    story = ["A train goes fast.", "Is it A or B?", "The answer is A."]
    trace, label, problem = made(story)
    problem = problem.model_copy(update={"answer": "A", "choices": ["north", "south"]})
    values = TrackedCharacters().logprobs(trace, label.model_copy(update={"answer": "A"}), problem)
    assert values == [0.0, 0.0, None]


class TrackedCharacters(AnswerTracker):
    """Finds where the answer is stated in traces of one token per character, without a model: each tracked sentence gets 0."""

    def __init__(self) -> None:
        self._offsets = TokenOffsets(decode)

    def logprobs(self, trace, label, problem):
        token = self._answer_token(trace, label, problem)
        return [0.0 if span.end_token <= token else None for span in label.sentences]


def test_the_answer_is_tracked_at_sentences_before_it_is_stated_with_the_token_that_states_it():
    trace, label, problem = addition(347, 285)
    loaded = load_model(BUILTIN)
    values = AnswerTracker(loaded).logprobs(trace, label, problem)
    assert [value is None for value in values] == [False, False, False, True]
    with torch.no_grad():  # at the last layer the lens is the model's own next-token prediction
        logits = loaded.model(torch.tensor([trace.prompt_ids + trace.completion_ids])).logits[0].log_softmax(-1)
    six = loaded.tokenizer.convert_tokens_to_ids("6")
    place = len(trace.prompt_ids) + label.sentences[1].end_token - 1
    assert values[1] == pytest.approx(float(logits[place, six]), abs=1e-4)
    assert AnswerTracker(loaded).logprobs(trace, label.model_copy(update={"answer": "999"}), problem) == [None] * 4
    assert AnswerTracker(loaded).logprobs(trace, label.model_copy(update={"answer": None}), problem) == [None] * 4


def test_tiers_are_balanced_whatever_the_values_and_equal_values_share_one():
    values = [math.exp(n % 37) for n in range(37)]
    assert sorted(Counter(quantile_names(values[:36], TIERS)).values()) == [9] * 4
    assert quantile_names([4.0, 1.0, None, 3.0, 2.0], TIERS) == ["critical", "low", None, "high", "medium"]
    tied = quantile_names([0.0, 0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0], TIERS)
    assert tied == ["low", "low", "medium", "high", "high", "high", "critical", "critical"]


def test_values_without_an_order_get_no_tier():
    assert quantile_names([0.5] * 8, TIERS) == [None] * 8
    assert quantile_names([1.0, 2.0, 3.0], TIERS) == [None] * 3
    assert quantile_names([], TIERS) == []


def test_sentences_are_ranked_within_their_problem_over_all_its_samples():
    values = {"p/0": [1.0, 2.0], "q/0": [100.0, 200.0, 300.0, 400.0], "p/1": [3.0, None, 4.0]}
    assert within_groups(values, lambda key: key[0], TIERS) == {
        "p/0": ["low", "medium"],
        "q/0": ["low", "medium", "high", "critical"],
        "p/1": ["high", None, "critical"],
    }
