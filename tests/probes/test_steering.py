"""Steering: what is planned, what is done to the states, and how its outcomes are judged."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from tests.calibrated import Calibrated
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem, Span, Trace, TraceLabel
from tribunal.models.generation import Finished
from tribunal.models.loading import load_model
from tribunal.models.residual import blocks, residual_hooks
from tribunal.probes.held_out import read_held_out
from tribunal.probes.steering import (
    Attempt,
    Chosen,
    Condition,
    SteeredTrace,
    SteeringRun,
    compression,
    conditions,
    middle_of,
    read_directions,
    repetition,
)
from tribunal.probes.steering_effects import RIGHT, WRONG, Cell, Effects, holm, sign_test, smallest_effect
from tribunal.probes.steering_report import EFFECT, finding, questions

SETTINGS = {
    "layer": None, "pooling": None, "kind": None, "traces_per_class": 4, "draws": 1, "start": ["prompt", "middle"], "strengths": [0.3],
    "random_directions": 20, "project_out": True, "adaptive_strengths": [0.3], "adaptive_percentile": 25.0, "upstream_layers": [1],
    "calibration_traces": 8, "max_new_tokens": 120, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "slots": 8, "wave_size": 32,
    "max_cache_gb": 1.0, "bootstrap": 100,
}  # fmt: skip


def run_of(calibrated: Calibrated, **changes) -> SteeringRun:
    folder = calibrated.root / "results/small"
    traces, labels, probes = (folder / job for job in ("generate_traces", "label_traces", "train_probes"))
    return SteeringRun(traces=traces, labels=labels, probes=probes, settings={**SETTINGS, **changes}, seed=0)


# The plan ---------------------------------------------------------------------------------------------------------------


def test_each_problem_is_steered_once_in_a_class_and_never_with_a_direction_that_saw_it(calibrated):
    run = run_of(calibrated)
    held_out = read_held_out(calibrated.root / "results/small/train_probes")
    for verdict in (WRONG, RIGHT):
        problems = [chosen.problem.id for chosen in run.chosen if chosen.was == verdict]
        assert len(problems) == len(set(problems)) == 4
    for chosen in run.chosen:
        expected = np.array(held_out.direction_of(chosen.problem.id).vector)
        assert run.directions.probe[chosen.fold] == pytest.approx(expected / np.linalg.norm(expected))
        assert chosen.fold == held_out.fold_of(chosen.problem.id)
        assert 0 < chosen.middle < chosen.trace.thought_end
    assert len({attempt.key for attempt in run.attempts}) == len(run.attempts) == len(run.conditions) * 8


def test_all_conditions_draw_a_trace_from_one_stream_and_not_from_its_first_one(calibrated):
    from tribunal.models.draws import stream

    run = run_of(calibrated)
    streams: dict[tuple[str, str], set[int]] = {}
    for attempt in run.attempts:
        streams.setdefault((attempt.condition.start, attempt.chosen.trace.key), set()).add(run._request(attempt).stream)
    assert {len(found) for found in streams.values()} == {1} and len(set.union(*streams.values())) == len(streams)
    first = {stream(0, chosen.trace.problem_id, chosen.trace.sample) for chosen in run.chosen}
    assert not first & set.union(*streams.values())


def test_every_push_has_its_twenty_random_directions_of_equal_length(calibrated):
    run = run_of(calibrated, strengths=[0.1, 0.7])
    units, _ = run.interventions(load_model(calibrated.experiment().model))
    for condition in (c for c in run.conditions if c.direction == "probe"):
        beside = Cell((condition,)).of("random")[0]
        assert all(beside._replace(number=n) in run.conditions for n in range(20))
        lengths = [np.linalg.norm(run._vector(c, fold)) for c in (condition, beside) for fold in run.directions.probe]
        assert lengths == pytest.approx([1.0] * len(lengths))
    assert units[2] > units[1] > 0


def test_a_probe_of_means_has_no_means_beside_it():
    assert "diff_of_means" in {c.direction for c in conditions(SETTINGS, 2, "logistic")}
    assert "diff_of_means" not in {c.direction for c in conditions(SETTINGS, 2, "diff_of_means")}


def test_a_place_that_is_not_the_headlines_has_one_direction_and_says_so(calibrated):
    folder = calibrated.root / "results/small/train_probes"
    headline = read_directions(folder)
    assert headline.held_out and len(headline.probe) == 3
    other = read_directions(folder, layer=1 if headline.place.layer == 2 else 2)
    assert not other.held_out and len(other.probe) == 1 and set(other.folds) == set(headline.folds)
    with pytest.raises(DataError, match="no logistic direction for layer 1, pooling 'nowhere'"):
        read_directions(folder, layer=1, pooling="nowhere", kind="logistic")


def made_trace(readable: int, thought_end: int | None, ends: list[int]) -> tuple[Trace, TraceLabel]:
    ids = list(range(readable))
    trace = Trace(
        problem_id="p", sample=0, prompt_ids=[1], completion_ids=ids, logprobs=[-1.0] * readable, finish_reason="stop", seed=0,
        readable=readable, thought="", thought_end=thought_end, response="", model="m", template_sha256="t",
    )  # fmt: skip
    spans = [Span(start_char=0, end_char=1, start_token=a, end_token=b) for a, b in zip([0, *ends], ends)]
    return trace, TraceLabel(problem_id="p", sample=0, verdict="correct", answer="1", gold="1", stratum=None, sentences=spans)


@pytest.mark.parametrize(
    ("readable", "thought_end", "ends", "expected"),
    [(20, None, [4, 9, 15, 20], 9), (30, 20, [4, 9, 15, 22, 30], 9), (20, None, [20], 10), (20, 12, [4, 14, 20], 4)],
)
def test_the_middle_is_the_sentence_end_nearest_to_half_of_the_thought(readable, thought_end, ends, expected):
    assert middle_of(*made_trace(readable, thought_end, ends)) == expected


def test_repetition_counts_runs_of_four_tokens_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0 and repetition([1, 2]) == 0
    assert repetition([7] * 13) == 0.9
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 0.2


# What is done to the states ------------------------------------------------------------------------------------------------


def test_states_are_changed_as_planned_from_the_start_on(calibrated):
    """The state after the block minus the state before the hook, read while whole waves are sampled."""
    loaded = load_model(calibrated.experiment().model)
    run = run_of(calibrated, upstream_layers=[])
    layer = run.layer
    units, steering = run.interventions(loaded)
    chosen = max(run.chosen, key=lambda chosen: chosen.fold)
    u = torch.tensor(run.directions.probe[chosen.fold], dtype=torch.float32)
    prompt = torch.tensor([chosen.trace.prompt_ids])
    start = prompt.shape[1] - 1

    def states(condition: Condition) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        steering.aim([condition.intervention(chosen.fold)], [start])
        with torch.no_grad(), residual_hooks(loaded.model, steering.edits()), residual_hooks(loaded.model, {layer: seen.append}):
            loaded.model(prompt.to(loaded.device))
        return seen[0][0].cpu()

    plain = states(Condition("prompt", layer, "none", "none", 0.0))
    pushed = states(Condition("prompt", layer, "add", "probe", -0.3))
    assert torch.equal(pushed[:start], plain[:start])
    torch.testing.assert_close(pushed[start:] - plain[start:], (-0.3 * units[layer] * u).expand(1, -1), atol=1e-4, rtol=1e-4)
    out = states(Condition("prompt", layer, "project_out", "probe", 0.0))
    assert float((out[start:] @ u).abs().max()) < 1e-5 * float(plain.norm(dim=-1).max())  # its score is zero
    assert len(blocks(loaded.model)) == 3


def test_the_adaptive_push_is_at_a_quarter_of_the_tokens_of_right_traces(calibrated):
    loaded = load_model(calibrated.experiment().model)
    run = run_of(calibrated, upstream_layers=[], calibration_traces=20)
    _, steering = run.interventions(loaded)
    fold = max(run.directions.probe)
    name = Condition("", run.layer, "adaptive", "probe", 0.3).intervention(fold)
    changed = total = 0
    for trace in run._calibration:
        ids, first = torch.tensor([[*trace.prompt_ids, *trace.completion_ids[: trace.readable]]]), len(trace.prompt_ids)
        before: list[torch.Tensor] = []
        seen: list[torch.Tensor] = []
        steering.aim([name], [0])
        order = {run.layer: before.append}, steering.edits(), {run.layer: seen.append}
        with torch.no_grad(), ExitStack() as hooks:
            for edits in order:
                hooks.enter_context(residual_hooks(loaded.model, edits))
            loaded.model(ids.to(loaded.device))
        changed += int((seen[0] != before[0]).any(-1)[0, first:].sum())
        total += ids.shape[1] - first
    assert changed / total == pytest.approx(0.25, abs=0.02)


def test_directions_of_another_model_or_too_few_tokens_are_refused(calibrated):
    loaded = load_model(calibrated.experiment().model)
    with pytest.raises(DataError, match=r"directions belong to a model with revision .*, the experiment's has other"):
        run_of(calibrated).sampling(replace(loaded, revision="other"), None)
    with pytest.raises(ConfigError, match=r"steer\.max_new_tokens: 5, but \d+ tokens of trace .* are kept"):
        run_of(calibrated, max_new_tokens=5).sampling(loaded, None)
    with pytest.raises(ConfigError, match=r"use at most \d+"):
        run_of(calibrated, max_new_tokens=10**6).sampling(loaded, None)


def test_what_was_kept_of_a_trace_is_graded_with_what_is_added_to_it(calibrated):
    loaded = load_model(calibrated.experiment().model)
    run = run_of(calibrated)
    for chosen in run.chosen:
        attempt = Attempt(Condition("middle", run.layer, "none", "none", 0.0), chosen, 0)
        rest = chosen.trace.completion_ids[chosen.middle :]
        assert run._request(attempt).prompt_ids == [*chosen.trace.prompt_ids, *chosen.trace.completion_ids[: chosen.middle]]

        def record(tokens: list[int], attempt: Attempt = attempt) -> SteeredTrace:
            done = Finished(attempt.key, tokens, [-1.0] * len(tokens), "stop", False)
            return run._record(attempt, done, loaded.format, {run.layer: 1.0})

        same = record(rest)
        assert (same.verdict, same.tokens, same.kept_tokens) == (chosen.was, len(rest), chosen.middle)
        added = chosen.trace.completion_ids[chosen.middle : chosen.trace.readable]
        assert same.compression == compression(loaded.format.decode(added))
        assert record([*rest[:2], loaded.eos_ids[0]]).verdict == "truncated"  # the thought that was opened is never closed


# How outcomes are judged ---------------------------------------------------------------------------------------------------


def world(right, broken=lambda c, verdict, i: False, n: int = 60, settings: dict | None = None) -> Effects:
    """Made-up outcomes: ``right(condition, class, trace number)`` for ``n`` problems of each class."""
    attempts, records = [], {}
    plan = conditions({**SETTINGS, "start": ["prompt"], "upstream_layers": [], **(settings or {})}, 1, "logistic")
    for condition, verdict, i in product(plan, (WRONG, RIGHT), range(n)):
        problem = Problem(id=f"{verdict}-{i}", question="?", answer="1", dataset="d", revision="r")
        trace = made_trace(20, None, [20])[0].model_copy(update={"problem_id": problem.id})
        attempt = Attempt(condition, Chosen(trace, problem, verdict, 0, 10), 0)
        lost = broken(condition, verdict, i)
        said = "unparsable" if lost else "correct" if right(condition, verdict, i) else "incorrect"
        attempts.append(attempt)
        records[attempt.key] = {"verdict": said, "repetition": 0.0, "compression": 1.0, "tokens": 10}
    return Effects(attempts, records, layer=1, resamples=200, seed=0)


def found(effects: Effects) -> dict[tuple[str, str], str]:
    asked = questions(effects, [1])
    adjusted = holm([question.effect.exact_p for question in asked])
    return {(q.cell.first.action, q.verdict + f"{q.sign:+d}"): finding(q, p) for q, p in zip(asked, adjusted, strict=True)}


def coin(c: Condition, i: int) -> bool:
    return bool(np.random.default_rng([3, c.number, len(c.direction), len(c.action), i]).random() < 0.5)


def test_a_push_that_beats_both_rivals_is_an_effect():
    effects = world(lambda c, verdict, i: i < 48 if (c.direction, c.strength > 0) == ("probe", True) else i < 30)
    effect = effects.effect(Cell((Condition("prompt", 1, "add", "probe", 0.3),)), WRONG)
    assert (effect.value.value, effect.none.value, effect.randoms.value) == (0.8, 0.5, 0.5)
    assert (effect.helped, effect.harmed, effect.exact_p) == (18, 0, pytest.approx(binomtest(18, 18).pvalue))
    assert effect.rank_above == pytest.approx(1 / 21) and effect.rank_below == 1.0
    assert found(effects)["add", "incorrect+1"] == EFFECT


def test_a_push_that_random_directions_match_is_no_better_than_random():
    helped = found(world(lambda c, verdict, i: i < 30 if c.action == "none" else i < 48))
    assert helped["add", "incorrect+1"] == "no more than random directions do"
    noise = found(world(lambda c, verdict, i: coin(c, i)))
    assert noise["add", "incorrect+1"] == "no better than random"
    assert noise["project_out", "correct-1"] == "no worse than random"


def test_a_push_that_only_spares_what_random_directions_break_is_no_effect():
    effects = world(lambda c, verdict, i: i < (10 if c.direction == "random" else 30))
    assert found(effects)["add", "incorrect+1"] == "no better than no steering, where random directions do harm"


def test_right_traces_lost_by_the_opposite_push_are_an_effect_too():
    effects = world(lambda c, verdict, i: i < (20 if (c.direction, c.strength < 0) == ("probe", True) else 50))
    assert found(effects)["add", "correct-1"] == EFFECT and found(effects)["add", "incorrect+1"] != EFFECT


def test_a_strength_that_breaks_text_is_named_and_left_out_of_the_pool():
    strong = {"strengths": [0.3, 1.0]}
    effects = world(lambda c, verdict, i: i < 30, lambda c, verdict, i: abs(c.strength) == 1.0 and i % 2 == 0, settings=strong)
    assert {c.first.strength for c in effects.cells if effects.only_breaks_text(c)} == {1.0, -1.0}
    assert [c.strength for c in effects.pooled(1, -1).conditions] == [-0.3]


def test_conditions_that_miss_an_attempt_are_left_out_whole():
    effects = world(lambda c, verdict, i: True, n=4, settings={"strengths": [0.3]})
    plan = conditions({**SETTINGS, "start": ["prompt"], "upstream_layers": []}, 1, "logistic")
    assert len(effects.conditions) == len(plan)
    problem = Problem(id="p", question="?", answer="1", dataset="d", revision="r")
    attempts = [Attempt(c, Chosen(made_trace(20, None, [20])[0], problem, v, 0, 10), 0) for c in plan[:3] for v in (WRONG, RIGHT)]
    record = {"verdict": "correct", "repetition": 0.0, "compression": None, "tokens": 1}
    records = {attempt.key: record for attempt in attempts}
    del records[attempts[2].key]
    assert Effects(attempts, records, layer=1, resamples=100, seed=0).left_out == [plan[1]]
    del records[attempts[0].key]
    with pytest.raises(DataError, match=r"without steering .* set aside"):
        Effects(attempts, records, layer=1, resamples=100, seed=0)


def test_the_sign_test_is_by_problem():
    up = np.array([1.0, 1, 0, -1, 0.5, -0.5])
    p, helped, harmed = sign_test(up, np.array([0, 0, 1, 2, 3, 3]))
    assert (helped, harmed) == (1, 1) and p == 1.0
    assert sign_test(np.ones(8), np.arange(8))[0] == pytest.approx(2 / 2**8)


def test_holms_correction_is_that_of_statsmodels_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(("n", "discordant"), [(40, 0.1), (100, 0.3)])
def test_the_smallest_effect_is_found_in_four_of_five_simulated_runs(n, discordant):
    effect = smallest_effect(n, discordant)
    assert effect is not None

    def power(size: float) -> float:
        rng = np.random.default_rng(0)
        changed = max(discordant, size)
        up, down, _ = rng.multinomial(n, [(changed + size) / 2, (changed - size) / 2, 1 - changed], size=2000).T
        p = np.minimum(1, 2 * binom.cdf(np.minimum(up, down), up + down, 0.5))
        return float(np.mean((p <= 0.05) & (up > down)))

    assert power(effect) > 0.77 and power(effect - 0.03) < 0.8
    assert smallest_effect(4, 0.1) is None  # four problems cannot reach p = 0.05
