"""Attention suppression: hiding nothing changes nothing, the future reaches no past, and hidden keys are really gone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import tiny_model
from tribunal.core.errors import ModelError
from tribunal.models.suppression import Suppression, hiding_mask, lens_logprobs

IDS = [(7 * n * n + 3 * n) % 97 for n in range(40)]
EACH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
FAMILY = pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])


def model_of(family: str, attention: str):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    return model


def mean_kl(base_LV: torch.Tensor, other_LV: torch.Tensor) -> float:
    base, other = base_LV.double().log_softmax(-1), other_LV.double().log_softmax(-1)
    return float((base.exp() * (base - other)).sum(-1).mean())


@FAMILY
@EACH
def test_hiding_nothing_costs_no_kl_and_a_later_token_never_changes_an_earlier_logit(family, attention):
    model = model_of(family, attention)
    suppression = Suppression(model)
    with torch.no_grad():
        plain_LV = model(torch.tensor([IDS])).logits[0]
    assert mean_kl(plain_LV, suppression.logits(IDS, [])) <= 1e-6
    for hidden in ([], [(5, 9)]):
        changed = suppression.logits([*IDS[:30], *(96 - i for i in IDS[30:])], hidden)
        assert torch.equal(changed[:30], suppression.logits(IDS, hidden)[:30])
        assert not torch.allclose(changed[30:], suppression.logits(IDS, hidden)[30:], atol=1e-2)


@FAMILY
@EACH
def test_hidden_tokens_reach_nothing_behind_them_and_everything_up_to_them_is_as_it_was(family, attention):
    suppression = Suppression(model_of(family, attention))
    other = [*IDS[:5], 1, 2, 3, 4, *IDS[9:]]  # other words in the hidden place
    shown, hidden = suppression.logits(IDS, []), suppression.logits(IDS, [(5, 9)])
    assert torch.allclose(hidden[9:], suppression.logits(other, [(5, 9)])[9:], atol=1e-4)
    assert not torch.allclose(shown[9:], suppression.logits(other, [])[9:], atol=1e-2)
    assert torch.equal(hidden[:9], shown[:9])


@FAMILY
def test_importances_from_the_reused_cache_are_those_of_whole_passes(family):
    suppression = Suppression(model_of(family, "sdpa"))
    base = suppression.logits(IDS, [])
    spans = [(0, 4), (5, 9), (10, 20), (30, 38)]
    found = suppression.importances(IDS, spans)
    for (start, end), value in zip(spans, found):
        assert value == pytest.approx(mean_kl(base[end:39], suppression.logits(IDS, [(start, end)])[end:39]), rel=1e-3)
    assert suppression.importances(IDS, [(30, 39), (39, 40)]) == [None, None]  # nothing is left behind them to predict
    assert suppression.importances(IDS, [(5, 9)], until=20) == pytest.approx(suppression.importances(IDS[:20], [(5, 9)]))


def test_what_rounding_alone_does_is_measured_as_an_importance_is_with_nothing_hidden():
    suppression = Suppression(model_of("qwen3", "sdpa"))
    [rounding] = suppression.importances(IDS, [(9, 9)])
    assert 0 <= rounding <= 1e-6
    coarse = Suppression(tiny_model("qwen3").to(torch.bfloat16))
    *hidden, rounding = coarse.importances(IDS, [(5, 9), (10, 20), (9, 9)])
    assert rounding < min(hidden)


def test_the_published_mask_of_ones_and_zeros_is_no_causal_mask():
    """The mistake that this module is there to avoid: hiding nothing then gives a bidirectional model."""
    model = model_of("qwen3", "sdpa")
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0]
        ones = model(torch.tensor([IDS]), attention_mask=torch.ones(1, 1, 40, 40)).logits[0]
    assert mean_kl(plain, ones) > 0.1


def test_a_query_sees_itself_the_past_and_no_span_that_ended_before_it():
    shown = hiding_mask((2, 6), 6, [(1, 3)], torch.float32, "cpu")[0, 0] == 0
    assert shown.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1]]


def test_a_model_that_does_not_take_the_mask_as_it_is_is_refused():
    sliding = tiny_model("qwen3")
    sliding.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="needs full attention in every layer, the model has sliding_attention"):
        Suppression(sliding)
    flash = tiny_model("qwen3")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="the model has flash_attention_2"):
        Suppression(flash)
    deaf = tiny_model("qwen3")
    forward = deaf.model.forward
    for misread in (torch.zeros_like, lambda mask: mask * 0):  # no mask at all, and NaN
        deaf.model.forward = lambda *a, attention_mask=None, misread=misread, **k: forward(
            *a, attention_mask=None if attention_mask is None else misread(attention_mask), **k
        )
        with pytest.raises(ModelError, match="hiding nothing changes the predictions of Qwen3ForCausalLM"):
            Suppression(deaf).importances(IDS, [(5, 9)])


def test_the_logit_lens_at_the_last_layer_is_the_models_own_prediction():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    with torch.no_grad():
        out = model(torch.tensor([IDS]), output_hidden_states=True)
        states: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda m, i, o: states.append(o[0] if isinstance(o, tuple) else o))
        model(torch.tensor([IDS]))
        handle.remove()
    torch.testing.assert_close(lens_logprobs(model, states[0][0], 11), out.logits[0].log_softmax(-1)[:, 11])
