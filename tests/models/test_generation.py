from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.tiny_models import FAMILIES, tiny_model
from tribunal.cluster.checkpoint import CheckpointStore
from tribunal.core.errors import ModelError, UserError
from tribunal.models import draws
from tribunal.models.generation import Finished, Request, Sampler, Token
from tribunal.models.residual import Change, Gate, Steering, inject

VOCAB = 97
EOS = [2, 3]


def requests(n: int = 11, longest: int = 30, seed: int = 5) -> list[Request]:
    """Prompts of 1-20 tokens, some of them asked twice; limits of 1 to ``longest`` new tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        length = int(torch.randint(1, 20, (1,), generator=generator))
        ids = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
        prompt = made[-1].prompt_ids if i % 3 == 2 else ids
        limit = int(torch.randint(1, longest + 1, (1,), generator=generator))
        made.append(Request(f"p{i}/0", prompt, limit, draws.stream(9, f"p{i}", 0)))
    return made


def sample(model, wave: list[Request], **settings) -> dict[str, Finished]:
    settings = {"eos_ids": EOS, "slots": 4, **settings}
    return {done.key: done for step in Sampler(model, **settings).run(wave) for done in step}


class AddNoise(LogitsProcessor):
    """Gumbel noise for ``generate``'s argmax, from the same counters."""

    def __init__(self, stream: int, prompt_tokens: int) -> None:
        self.stream, self.prompt_tokens = stream, prompt_tokens

    def __call__(self, input_ids, scores):
        keys = draws.position_keys([self.stream], [input_ids.shape[1] - self.prompt_tokens])
        return scores + draws.gumbel(keys, scores.shape[-1])


def by_generate(model, request: Request, processors=(), noise: bool = False) -> tuple[list[int], list[float]]:
    """Tokens and T = 1 log-probabilities of ``model.generate`` for one request alone."""
    prompt = torch.tensor([request.prompt_ids])
    processors = LogitsProcessorList([*processors, *([AddNoise(request.stream, prompt.shape[1])] if noise else [])])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        logits_processor=processors,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, prompt.shape[1] :]
    logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist()


def assert_equals_generate(model, wave, done, processors=(), noise=False) -> None:
    assert set(done) == {request.key for request in wave}
    for request in wave:
        tokens, logprobs = by_generate(model, request, processors, noise)
        assert done[request.key].tokens == tokens
        assert done[request.key].logprobs == pytest.approx(logprobs, abs=2e-4)
        assert done[request.key].finish_reason == ("stop" if tokens[-1] in EOS else "length")
        assert not done[request.key].continued


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate(family):
    model, wave = tiny_model(family), requests()
    assert_equals_generate(model, wave, sample(model, wave, temperature=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_output_equals_generate_with_the_same_noise(family):
    model, wave = tiny_model(family), requests()
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9)]
    done = sample(model, wave, temperature=0.7, top_k=40, top_p=0.9)
    assert_equals_generate(model, wave, done, warpers, noise=True)


def test_a_sliding_window_model_equals_generate():
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        use_sliding_window=True, sliding_window=8, max_window_layers=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, wave = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), requests()
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    assert_equals_generate(model, wave, sample(model, wave, temperature=0))


def test_draws_do_not_depend_on_slots_order_or_company():
    """At these sizes the rounding of other batch shapes turns no draw."""
    model, wave = tiny_model("qwen3"), requests(16)
    expected = {key: done.tokens for key, done in sample(model, wave, slots=4).items()}
    for slots in (1, 3, 16):
        assert {key: done.tokens for key, done in sample(model, wave, slots=slots).items()} == expected
    assert {key: done.tokens for key, done in sample(model, wave[::-1]).items()} == expected
    assert sample(model, wave[3:4])[wave[3].key].tokens == expected[wave[3].key]


def test_frequencies_of_sampled_tokens_match_the_softmax():
    from scipy import stats

    model = tiny_model("qwen3", spread=0.1)
    wave = [Request(f"p/{s}", [5, 6, 7], 1, draws.stream(0, "p", s)) for s in range(4000)]
    done = sample(model, wave, slots=512, eos_ids=[])
    probabilities = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1).detach().numpy()
    counts = torch.bincount(torch.tensor([finished.tokens[0] for finished in done.values()]), minlength=VOCAB).numpy()
    assert stats.chisquare(counts, probabilities * 4000).pvalue > 0.01
    expected = math.log(probabilities[done["p/0"].tokens[0]])
    assert done["p/0"].logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_a_wave_is_the_same_to_the_byte_when_replayed():
    model, wave = tiny_model("llama"), requests(16)
    assert sample(model, wave) == sample(model, wave)


class StopAt:
    """Stops at one look, or asks to save at every look."""

    def __init__(self, look: int | None = None, save_from: int | None = None) -> None:
        self.look, self.save_from, self.looks = look, save_from, 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.look is not None and self.looks > self.look

    def save_due(self) -> bool:
        return self.save_from is not None and self.looks >= self.save_from


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "states", owner="test")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_wave_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, temperature):
    wave = requests(9, longest=12)
    settings = {"eos_ids": EOS, "slots": 4, "temperature": temperature}
    expected = [done for step in Sampler(tiny_model("qwen3"), **settings).run(wave) for done in step]
    counting = StopAt()
    assert list(Sampler(tiny_model("qwen3"), **settings).run(wave, counting))
    assert counting.looks > 15
    for look in range(counting.looks):
        places = store(tmp_path / str(look))
        before = [d for step in Sampler(tiny_model("qwen3"), **settings).run(wave, StopAt(look), places) for d in step]
        assert len(before) < len(wave)
        after = [d for step in Sampler(tiny_model("qwen3"), **settings).run(wave, None, places) for d in step]
        assert before + after == expected  # tokens, log-probabilities to the bit, order, each exactly once
        assert places.newest() is None


def test_a_wave_stopped_at_every_step_goes_on_to_the_same_bytes(tmp_path):
    model, wave, done = tiny_model("gpt2"), requests(6, longest=10), []
    for _ in range(200):
        got = [d for step in Sampler(model, eos_ids=EOS, slots=3).run(wave, StopAt(1), store(tmp_path)) for d in step]
        done += got
        if len(done) == len(wave):
            break
    assert {d.key: d for d in done} == sample(model, wave, slots=3)


def test_a_kill_after_a_periodic_save_goes_on_from_it(tmp_path):
    model, wave = tiny_model("qwen3"), requests(9, longest=12)
    expected = sample(model, wave)
    running = Sampler(model, eos_ids=EOS, slots=4).run(wave, StopAt(save_from=5), store(tmp_path))
    seen = {d.key: d for d in next(running)} | {d.key: d for d in next(running)} | {d.key: d for d in next(running)}
    del running  # the process is gone; what it had yielded is durable, what it saved last is older
    rest = {d.key: d for step in Sampler(model, eos_ids=EOS, slots=4).run(wave, None, store(tmp_path)) for d in step}
    assert seen | rest == expected


def test_state_of_another_wave_or_other_settings_is_not_used(tmp_path):
    model, wave = tiny_model("qwen3"), requests(6)
    list(Sampler(model, eos_ids=EOS, slots=4).run(wave, StopAt(4), store(tmp_path)))
    assert store(tmp_path).newest() is not None
    for other, settings in (
        (wave[:5], {}),
        (requests(6, seed=6), {}),
        (wave, {"slots": 3}),
        (wave, {"temperature": 0.5}),
        (wave, {"top_k": 3}),
    ):
        sampler = Sampler(model, eos_ids=EOS, **{"slots": 4, **settings})
        assert sampler._restore(other, store(tmp_path)) is None
    assert Sampler(model, eos_ids=EOS, slots=4)._restore(wave, store(tmp_path)) is not None


def test_leaving_a_part_of_the_state_out_is_noticed(tmp_path):
    """The test of the test: without a row's tokens or with a spoiled cache the bytes differ."""
    model, wave = tiny_model("qwen3"), requests(9, longest=12)
    expected = sample(model, wave)

    def resumed_from(spoil) -> dict[str, Finished]:
        places = store(tmp_path / spoil.__name__)
        sampler = Sampler(model, eos_ids=EOS, slots=4)
        before = [d for step in sampler.run(wave, StopAt(6), places) for d in step]
        newest = places.newest()
        spoil(newest.path)
        places.newest = lambda: newest  # past the manifest's hashes
        return {d.key: d for d in before} | {d.key: d for step in sampler.run(wave, None, places) for d in step}

    def nothing(folder: Path) -> None:
        pass

    def one_token_back(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        for row in state["rows"]:
            row["tokens"] = row["tokens"][:1]
        (folder / "state.json").write_text(json.dumps(state))

    def zero_a_layer(folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = load_file(folder / "cache.safetensors")
        save_file({**tensors, "values.1": torch.zeros_like(tensors["values.1"])}, folder / "cache.safetensors")

    assert resumed_from(nothing) == expected
    assert resumed_from(one_token_back) != expected
    assert resumed_from(zero_a_layer) != expected


def test_a_cache_too_large_to_save_is_computed_again_and_said(tmp_path):
    model, wave = tiny_model("qwen3"), requests(9, longest=12)
    expected = sample(model, wave)
    sampler = Sampler(model, eos_ids=EOS, slots=4, max_cache_gb=0)
    done = {d.key: d for step in sampler.run(wave, StopAt(6), store(tmp_path)) for d in step}
    assert not list(tmp_path.rglob("cache.safetensors"))
    live = {row["index"] for row in json.loads((store(tmp_path).newest().path / "state.json").read_text())["rows"]}
    done |= {d.key: d for step in sampler.run(wave, None, store(tmp_path)) for d in step}
    assert {key: d.tokens for key, d in done.items()} == {key: d.tokens for key, d in expected.items()}
    for i, request in enumerate(wave):
        assert done[request.key].continued == (i in live)
        assert done[request.key].logprobs == pytest.approx(expected[request.key].logprobs, abs=1e-4)


def test_prompts_that_do_not_fit_one_prefill_pass_are_split(monkeypatch):
    from tribunal.models import generation

    model, wave = tiny_model("qwen3"), requests(9)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 25)
    assert_equals_generate(model, wave, sample(model, wave, slots=8, temperature=0))


def test_output_that_is_no_number_is_refused_by_name():
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(ModelError, match="p0/0: the model's output at token 0 is not finite"):
        sample(model, requests(3))


def test_running_out_of_memory_names_the_setting_to_lower(monkeypatch):
    model = tiny_model("qwen3")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(UserError, match=r"generate_traces\.slots=4: lower it"):
        list(Sampler(model, eos_ids=EOS, slots=4, slots_field="generate_traces.slots").run(requests(3)))


def test_layers_without_attention_are_refused():
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        Sampler(model, eos_ids=EOS, slots=4)


WIDTH = 32
PUSH, DROP, UP = (torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3))
STEERING = Steering({"push": [Change(1, add_D=6 * PUSH)], "drop": [Change(0, remove_D=DROP), Change(1, add_D=4 * UP)]})


def steered_requests(n: int = 12, longest: int = 14) -> list[Request]:
    """Every third request asks its neighbour's prompt under another intervention, one in three is unsteered."""
    return [request._replace(intervention=("push", "", "drop")[i % 3]) for i, request in enumerate(requests(n, longest))]


@contextmanager
def hooked(model, intervention: str, start: int | None = None) -> Iterator[None]:
    """The interventions by plain hooks and formulas; from ``start`` on, or from the last token of each pass."""

    def change(function):
        def hook(module, inputs, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            first = hidden.shape[1] - 1 if start is None else start
            hidden[:, first:] = function(hidden[:, first:])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    projector = torch.eye(WIDTH) - torch.outer(DROP, DROP) / (DROP @ DROP)
    handles = []
    if intervention == "push":
        handles = [layers[1].register_forward_hook(change(lambda h: h + 6 * PUSH))]
    elif intervention == "drop":
        handles = [layers[0].register_forward_hook(change(lambda h: h @ projector))]
        handles += [layers[1].register_forward_hook(change(lambda h: h + 4 * UP))]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_steered_rows_beside_unsteered_ones_equal_generate_under_plain_hooks(family):
    model, wave = tiny_model(family), steered_requests()
    done = sample(model, wave, steering=STEERING)
    for request in wave:
        with hooked(model, request.intervention):
            tokens, logprobs = by_generate(model, request, noise=True)
        assert done[request.key].tokens == tokens
        assert done[request.key].logprobs == pytest.approx(logprobs, abs=2e-4)
    plain = sample(model, [request._replace(intervention="") for request in wave])
    assert sum(done[r.key].tokens != plain[r.key].tokens for r in wave) >= 5  # the interventions do change what is said


def test_a_steered_greedy_token_is_that_of_a_forward_pass_without_cache_under_a_plain_hook():
    """Every state from the prompt's last token on is changed, and none before it."""
    model, wave = tiny_model("llama"), steered_requests(6)
    for key, done in sample(model, wave, steering=STEERING, temperature=0).items():
        request = next(r for r in wave if r.key == key)
        with hooked(model, request.intervention, start=len(request.prompt_ids) - 1), torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *done.tokens]]), use_cache=False).logits[0]
        assert done.tokens == logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()


def test_a_wave_of_unsteered_requests_is_the_same_to_the_byte_with_a_sampler_that_can_steer():
    model, wave = tiny_model("qwen3"), requests(9)
    assert sample(model, wave, steering=STEERING) == sample(model, wave)


def test_a_steered_wave_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path):
    gated = {"push": [Change(1, add_D=6 * PUSH, gate=Gate(DROP, 0.0))], "drop": [Change(0, remove_D=DROP)]}

    def run(stop=None, places=None) -> list[Finished]:
        sampler = Sampler(tiny_model("qwen3"), eos_ids=EOS, slots=4, steering=Steering(gated))
        return [done for step in sampler.run(steered_requests(9, 10), stop, places) for done in step]

    expected, counting = run(), StopAt()
    run(counting)
    for look in range(0, counting.looks, 2):
        places = store(tmp_path / str(look))
        assert run(StopAt(look), places) + run(None, places) == expected


def test_tokens_prefilled_again_after_a_resume_are_steered_as_they_were(tmp_path):
    """Two rows of one length and different starts: the states before the prompt's last token stay as they are."""
    model = tiny_model("qwen3")
    wave = [r._replace(max_new_tokens=12) for r in steered_requests(8)]
    wave += [wave[0]._replace(key="again"), wave[0]._replace(key="plain", intervention="")]
    sampler = Sampler(model, eos_ids=[], slots=10, steering=STEERING, max_cache_gb=0)
    assert not [d for step in sampler.run(wave, StopAt(6), store(tmp_path)) for d in step]
    resumed = {d.key: d for step in sampler.run(wave, None, store(tmp_path)) for d in step}
    expected = sample(model, wave, slots=10, eos_ids=[], steering=STEERING)
    for key, done in expected.items():
        assert resumed[key].tokens == done.tokens and resumed[key].continued
        assert resumed[key].logprobs == pytest.approx(done.logprobs, abs=1e-4)


def test_state_of_a_wave_under_other_interventions_is_not_used(tmp_path):
    model, wave = tiny_model("qwen3"), steered_requests(6)
    list(Sampler(model, eos_ids=EOS, slots=4, steering=STEERING).run(wave, StopAt(4), store(tmp_path)))
    assert store(tmp_path).newest() is not None

    def state(names: Sequence[str], push: torch.Tensor):
        steering = Steering({"push": [Change(1, add_D=push)], "drop": [Change(0, remove_D=DROP), Change(1, add_D=4 * UP)]})
        given = [request._replace(intervention=name) for request, name in zip(wave, names, strict=True)]
        return Sampler(model, eos_ids=EOS, slots=4, steering=steering)._restore(given, store(tmp_path))

    names = [request.intervention for request in wave]
    assert state(names, 6 * PUSH) is not None
    assert state(names, 6.001 * PUSH) is None
    assert state(["drop", *names[1:]], 6 * PUSH) is None


def test_a_stream_gives_each_token_of_the_run_once_and_in_order():
    model, wave = tiny_model("qwen3"), steered_requests(9)
    streamed: dict[str, list[Token]] = {}
    for step in Sampler(model, eos_ids=EOS, slots=4, steering=STEERING).stream(wave):
        assert len({token.key for token in step}) == len(step)  # a row gets one token per step
        for token in step:
            streamed.setdefault(token.key, []).append(token)
    for key, done in sample(model, wave, steering=STEERING).items():
        assert [token.index for token in streamed[key]] == list(range(len(done.tokens)))
        assert [token.token for token in streamed[key]] == done.tokens
        assert [token.logprob for token in streamed[key]] == done.logprobs
        assert [token.finish_reason for token in streamed[key]] == [None] * (len(done.tokens) - 1) + [done.finish_reason]


def test_what_is_put_around_a_prefill_reaches_the_rows_of_its_requests(tmp_path, monkeypatch):
    """Two requests with one prompt and different vectors, also when the pass is split and after a resume without cache."""
    from tribunal.models import generation

    model = tiny_model("qwen3")
    wave = [Request(f"q{i}", prompt, 8, i) for i, prompt in enumerate([[5, 6, 7, 8], [5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])]
    vectors = {request.key: vector for request, vector in zip(wave, (PUSH, UP, DROP), strict=True)}

    def around(keys: Sequence[str]):
        given = torch.stack([vectors[key] for key in keys])
        return inject(model, given, torch.arange(len(keys)), torch.full((len(keys),), 2), layer=0, scale=3.0)

    for prefill_tokens in (8192, 8):
        monkeypatch.setattr(generation, "PREFILL_TOKENS", prefill_tokens)
        done = sample(model, wave, eos_ids=[], temperature=0, around_prefill=around)
        sampler = Sampler(model, eos_ids=[], slots=4, temperature=0, around_prefill=around, max_cache_gb=0)
        assert not list(sampler.run(wave, StopAt(5), store(tmp_path)))
        resumed = {d.key: d for step in sampler.run(wave, None, store(tmp_path)) for d in step}
        for request in wave:
            with inject(model, vectors[request.key][None], torch.tensor([0]), torch.tensor([2]), layer=0, scale=3.0):
                whole = torch.tensor([[*request.prompt_ids, *done[request.key].tokens]])
                expected = model(whole, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()
            assert done[request.key].tokens == expected == resumed[request.key].tokens
        assert done["q0"].tokens != done["q1"].tokens
