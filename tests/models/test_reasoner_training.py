"""The built-in reasoner's training traces: well-formed, with the planted slips at the stated rates, and free of state."""

from __future__ import annotations

import re

import pytest
import torch
from pydantic import ValidationError

from tribunal.models import reasoner_training as training
from tribunal.models.reasoner import VOCABULARY, build_tokenizer, read_completion
from tribunal.models.reasoner_training import Draws, Recipe, TrainingBatches, training_traces


@pytest.fixture(scope="module")
def traces():
    return [trace for step in range(120) for trace in training_traces(step, Recipe())]


def test_every_trace_follows_its_own_written_digits_and_reports_the_truth(traces):
    """Read from the text alone, with code of the test's own."""
    for trace in traces:
        text = trace.completion()
        thought, answer, report = re.fullmatch(r"(.*)</think>\nAnswer: (\d+)<sep>([yn])<eos>", text).groups()
        columns: list[str] = []
        kept, carry = [], ["0"]
        for part in thought.split(" | "):
            redone = part.startswith("wait ")
            if redone:
                columns.pop(), kept.pop(), carry.pop()
            addends, total, written = re.match(r"(?:wait )?([\d+]+)=(\d+) write (\d+)", part).groups()
            assert sum(int(n) for n in addends.split("+")) == int(total), "the sum itself is never wrong"
            left, right, *carried = addends.split("+")
            place = len(columns)
            assert (left, right) == (str(trace.a)[-1 - place], str(trace.b)[-1 - place])
            assert carried == ([carry[-1]] if place else [])
            columns.append(left)
            kept.append(written)
            carry.append(part.partition(" carry ")[2] or "0")
            if redone:
                assert int(total) == int(written) + 10 * int(carry[-1]), "a redone step is right"
        assert len(columns) == len(str(trace.a)) == len(str(trace.b))
        assert int(answer) == int("".join(reversed(kept)))
        assert (report == "y") == (int(answer) == trace.a + trace.b)
        assert read_completion(text) == (trace.steps, int(answer), report == "y")


def test_slips_come_at_the_stated_rates(traces):
    first = [step for trace in traces for step in trace.steps if not step.redone]
    slips = sum(step.slipped for step in first)
    redone = sum(step.redone for trace in traces for step in trace.steps)
    assert slips / len(first) == pytest.approx((0.03 + 0.40) / 2, abs=0.02)
    assert redone / slips == pytest.approx(0.25, abs=0.04)
    digits = [len(str(trace.a)) for trace in traces]
    assert [round(digits.count(d) / len(digits), 1) for d in (2, 3, 4)] == pytest.approx([1 / 9, 4 / 9, 4 / 9], abs=0.12)


def test_a_trace_depends_on_seed_step_and_place_alone():
    whole = training_traces(7, Recipe())
    assert training_traces(7, Recipe(batch_size=5)) == whole[:5]
    assert training_traces(8, Recipe()) != whole != training_traces(7, Recipe(seed=4))
    assert len({len(str(trace.a)) for trace in whole}) == 1


def test_draws_are_uniform_and_do_not_change_between_versions():
    values = [Draws("u", i).uniform() for i in range(4000)]
    assert min(values) >= 0 and max(values) < 1
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    draws = Draws(3, "trace", 0, 0)
    assert [draws.below(1000) for _ in range(10)] == [774, 742, 921, 344, 985, 887, 937, 926, 483, 76]


def test_held_out_problems_are_never_trained_on(traces):
    assert not any(training.held_out(trace.a, trace.b) for trace in traces)
    unseen = [training.draw_problem(3, Draws("unseen", i), unseen=True) for i in range(50)]
    assert all(training.held_out(a, b) and 100 <= a <= 999 and 100 <= b <= 999 for a, b in unseen)


def test_labels_cover_the_completion_and_decisive_tokens_weigh_more():
    batch = TrainingBatches(Recipe(batch_size=3))[0]
    labels = batch["labels"]
    assert torch.equal(batch["input_ids"][labels != -100], labels[labels != -100])
    traces = training_traces(0, Recipe(batch_size=3))
    decoded = [build_tokenizer().decode(row[row != -100]) for row in labels]
    assert decoded == [trace.completion() for trace in traces]
    for row, weights in zip(labels, training.loss_weights(labels, 6.0)):
        tokens = [VOCABULARY[i] if i >= 0 else None for i in row.tolist()]
        before = [None, *tokens[:-1]]
        for token, previous, weight in zip(tokens, before, weights.tolist()):
            decisive = token in (" | ", "</think>") or previous in (" | ", "</think>", "<sep>")
            assert weight == (0.0 if token is None else 6.0 if decisive else 1.0)


def test_initial_weights_depend_on_the_recipe_alone_and_leave_the_generator_alone():
    small = Recipe(width=16, heads=2, layers=1, mlp_width=16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = training.build_model(small)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = training.build_model(small)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("wrong", [{"digits": (2, 3)}, {"digits": (0, 3, 4)}, {"heads": 3}, {"digit_weights": (0, 0, 0)}])
def test_a_recipe_that_cannot_be_trained_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong)).split("_")[0]):
        Recipe(**wrong)
