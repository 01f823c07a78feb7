"""A running generation under a direction: streamed scores are the offline ones, and nothing foreign is accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_folder
from tribunal.core.config import ModelConfig
from tribunal.core.errors import DataError, ModelError, UserError
from tribunal.core.records import Problem
from tribunal.models import draws
from tribunal.models.generation import Request, Sampler
from tribunal.models.loading import LoadedModel, load_model
from tribunal.models.residual import capture
from tribunal.probes.direction import Direction, Directions, Model, Place, hook_point, vector_norm
from tribunal.probes.monitor import Monitor, Running, running_logits
from tribunal.traces.labels import Labeller
from tribunal.traces.sampling import Attempt, make_trace

LAYER = 1
SPAN = {"last": 1, "last_10": 10, "mean": 10_000, "sentence": 1}
"""How many of the last tokens a pooling averages."""


@pytest.fixture(scope="module")
def reasoner() -> LoadedModel:
    return load_model(ModelConfig(name="builtin:addition", dtype="float32", device="cpu"))


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def tiny(request, tmp_path_factory) -> LoadedModel:
    folder = tiny_folder(tmp_path_factory.mktemp("models"), request.param, layers=3)
    return load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu", prompt="plain"))


def directions_for(loaded: LoadedModel, pooling: str = "mean", **changes) -> Directions:
    vector = np.random.default_rng(0).standard_normal(loaded.d_model) / 4
    direction = Direction(
        layer=LAYER, pooling=pooling, hook_point=hook_point(LAYER), vector=vector.tolist(), bias=0.25, norm=vector_norm(vector),
        metrics={}, training_set_sha256=None,
    )  # fmt: skip
    fields = {
        "model": Model(name=loaded.name, revision=loaded.revision, d_model=loaded.d_model, n_layers=loaded.n_layers),
        "dataset": {},
        "directions": [direction],
        "best": Place(layer=LAYER, pooling=pooling),
        "dtype": "float32",
        "template_sha256": loaded.format.template_sha256,
    }
    return Directions(**{**fields, **changes})


def offline(loaded: LoadedModel, directions: Directions, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """P(correct) after each token, from one pass over the whole text and the pooled states themselves."""
    direction = directions.select()
    states_LD = capture(loaded.model, torch.tensor([prompt_ids + completion_ids]), [LAYER])[LAYER][0, len(prompt_ids) :].double()
    pooled = [states_LD[max(0, i - SPAN[direction.pooling]) : i].mean(0) for i in range(1, len(completion_ids) + 1)]
    return direction.score(torch.stack(pooled)).tolist()


@pytest.mark.parametrize("pooling", SPAN)
def test_streamed_scores_are_the_offline_ones_to_1e_5(tiny, pooling):
    directions = directions_for(tiny, pooling)
    ids = tiny.format.prompt_ids(Problem(id="q", question="How far is it?", answer="", dataset="d", revision="r"))
    steps = list(Monitor(directions).stream(tiny, "How far is it?", max_new_tokens=24))
    assert len(steps) == 24 and steps[-1].finish_reason == "length", "the last token, never fed to draw another one, is scored too"
    expected = offline(tiny, directions, ids, [step.token for step in steps])
    assert np.ptp(expected) > 0.1, "the scores hardly move"
    np.testing.assert_allclose([step.score for step in steps], expected, atol=1e-5)


def test_on_the_reasoner_it_ends_before_the_self_report_and_tells_the_labelled_sentences(reasoner):
    directions = directions_for(reasoner)
    monitor = Monitor(directions)
    for sample in range(4):
        problem = Problem(id="37+85", question="37 + 85 =", answer="122", dataset="addition", revision="r")
        request = Request("x", reasoner.format.prompt_ids(problem), 120, draws.stream(0, problem.id, sample))
        (done,) = next(Sampler(reasoner.model, eos_ids=reasoner.eos_ids, slots=1).run([request]))
        trace = make_trace(Attempt(problem, sample), request.prompt_ids, done, reasoner.format, seed=0, model="m")
        steps = list(monitor.stream(reasoner, problem, max_new_tokens=120, sample=sample))
        assert [step.token for step in steps] == trace.completion_ids[: trace.readable]
        assert steps[-1].finish_reason == "stop" and not any(step.finish_reason for step in steps[:-1])
        expected = offline(reasoner, directions, trace.prompt_ids, trace.completion_ids[: trace.readable])
        np.testing.assert_allclose([step.score for step in steps], expected, atol=1e-5)
        np.testing.assert_allclose([step.logprob for step in steps], trace.logprobs[: trace.readable], atol=1e-5)
        text = "".join(step.text for step in steps)
        assert text == reasoner.format.decode(trace.completion_ids[: trace.readable])
        told = [sentence for step in steps for sentence in step.sentences]
        spans = Labeller(reasoner.format.decode, reasoner.format.tags).label(trace, problem).sentences
        assert [(s.start_token, s.end_token, s.text) for s in told] == [
            (span.start_token, span.end_token, text[span.start_char : span.end_char]) for span in spans
        ]
        assert [sentence.score for sentence in told] == [steps[span.end_token - 1].score for span in spans]
        by_sentence = list(monitor.stream(reasoner, problem, max_new_tokens=120, sample=sample, every="sentence"))
        assert [step.index for step in by_sentence] == [step.index for step in steps if step.sentences]


def test_many_rows_are_watched_together_each_under_its_own_score_and_sample_as_without_a_monitor(tiny):
    directions = directions_for(tiny)
    prompts = [[5, 6, 7, 8 + i] for i in range(5)]
    requests = [Request(f"{i}", ids, 6 + 5 * i, draws.stream(0, f"{i}", 0)) for i, ids in enumerate(prompts)]
    alone = {done.key: done for step in Sampler(tiny.model, eos_ids=tiny.eos_ids, slots=2).run(requests) for done in step}
    found: dict[str, list] = {request.key: [] for request in requests}
    for told in Monitor(directions).watch(Sampler(tiny.model, eos_ids=tiny.eos_ids, slots=2), requests):
        tiny.model(torch.tensor([[1, 2, 3]]))  # the caller may use the model in between
        for watched in told:
            found[watched.token.key].append(watched)
    for request in requests:
        ids = [watched.token.token for watched in found[request.key]]
        assert ids == [token for token in alone[request.key].tokens if token not in tiny.eos_ids]
        expected = offline(tiny, directions, request.prompt_ids, ids)
        np.testing.assert_allclose(1 / (1 + np.exp([-w.logit for w in found[request.key]])), expected, atol=1e-5)
    assert not any(module._forward_hooks for module in tiny.model.modules())


@pytest.mark.parametrize("pooling", ["mean", "last_10", "last", "think_end", "percentile"])
def test_following_a_trace_step_by_step_and_in_one_go_are_the_same(pooling):
    projections = np.random.default_rng(1).standard_normal(37)
    for length in (1, 9, 10, 11, 37):
        running = Running(pooling, bias=0.5)
        steps = [running.add(value) for value in projections[:length]]
        np.testing.assert_allclose(running_logits(projections[:length], pooling, 0.5), steps, atol=1e-12)


def other(loaded: LoadedModel, **changes) -> Model:
    fields = {"name": loaded.name, "revision": loaded.revision, "d_model": loaded.d_model, "n_layers": loaded.n_layers}
    return Model(**{**fields, **changes})


def test_another_model_revision_dtype_or_template_is_refused_and_named(reasoner):
    def refused(**changes) -> str:
        with pytest.raises(ModelError) as caught:
            Monitor(directions_for(reasoner, **changes)).stream(reasoner, "1 + 2 =")
        return str(caught.value)

    assert "its model is org/other@abc, the model's builtin:addition@folder:" in refused(
        model=other(reasoner, name="org/other", revision="abc")
    )
    assert "its model is builtin:addition@folder:0, the model's builtin" in refused(model=other(reasoner, revision="folder:0"))
    assert "its dtype is bfloat16, the model's float32" in refused(dtype="bfloat16")
    said = refused(template_sha256="0" * 64)
    assert "its template is 000000000000..., the model's " in said and "its model" not in said and "its dtype" not in said
    assert "layer 1 of 36 (the model has 3)" in refused(model=other(reasoner, n_layers=36))
    changes = {"dtype": "bfloat16", "template_sha256": "0" * 64}
    assert next(Monitor(directions_for(reasoner, **changes), allow=["dtype", "template"]).stream(reasoner, "1 + 2 =")).index == 0
    moved = directions_for(reasoner, model=other(reasoner, name="/elsewhere/copy"))
    Monitor(moved).require(reasoner)  # a folder is named by its content


def test_another_width_is_refused_whatever_is_allowed(reasoner, tmp_path):
    narrow = load_model(ModelConfig(name=str(tiny_folder(tmp_path, "qwen3", layers=3)), dtype="float32", device="cpu", prompt="plain"))
    with pytest.raises(ModelError, match=r"d_model 32 \(the model's is 128\)"):
        Monitor(directions_for(narrow), allow=["model", "dtype", "template"]).stream(reasoner, "1 + 2 =")


def test_the_older_form_says_too_little_and_is_taken_on_the_callers_word_only(reasoner):
    older = directions_for(reasoner, pooling="unknown", model=other(reasoner, name=None, revision=None), dtype=None, template_sha256=None)
    with pytest.raises(DataError, match=r"does not say which tokens .* give pooling, one of last, last_10, mean"):
        Monitor(older)
    with pytest.raises(ModelError, match=r"its model is not in the file, .* its dtype is not in the file, .* allow model, dtype, template"):
        Monitor(older, pooling="last").stream(reasoner, "1 + 2 =")
    assert next(Monitor(older, pooling="last", allow=["model", "dtype", "template"]).stream(reasoner, "1 + 2 =")).index == 0


def test_what_cannot_be_followed_or_asked_is_refused_in_one_line(reasoner):
    with pytest.raises(DataError, match="'prompt_end' reads the prompt alone"):
        Monitor(directions_for(reasoner, pooling="prompt_end"))
    with pytest.raises(DataError, match="trained on 'mean' and cannot be followed as 'last'"):
        Monitor(directions_for(reasoner), pooling="last")
    with pytest.raises(UserError, match="cannot allow 'layer'; model, dtype, template may differ"):
        Monitor(directions_for(reasoner), allow=["layer"])
    with pytest.raises(ModelError, match=r"a prompt of \d+ and 100000 new tokens do not fit the model's \d+ positions"):
        Monitor(directions_for(reasoner)).stream(reasoner, "1 + 2 =", max_new_tokens=100_000)
