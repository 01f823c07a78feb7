"""Heads and MLPs as writers into the residual stream: their parts sum to the whole, and one is replaced alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from tests.tiny_models import FAMILIES, tiny_model
from tribunal.core.errors import ModelError
from tribunal.models.components import Component, Components, Means
from tribunal.models.residual import blocks, capture


def ids() -> torch.Tensor:
    return torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(1))


def weights() -> torch.Tensor:
    given = torch.rand(3, 9, generator=torch.Generator().manual_seed(2))
    given[1, 6:] = 0
    return given / given.sum(1, keepdim=True)


@pytest.fixture(params=FAMILIES)
def model(request):
    made = tiny_model(request.param, layers=4, spread=0.1)
    if request.param == "gpt2":
        torch.nn.init.normal_(blocks(made)[1].attn.c_proj.bias)
    return made


@torch.no_grad()
def test_contributions_sum_to_the_projection_of_the_residual_stream(model):
    components = Components(model, 2)
    directions = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    writes = components.read(ids(), weights())
    parts = components.contributions(writes, directions)
    stream = torch.einsum("bl,bld->bd", weights(), capture(model, ids(), [2])[2])
    torch.testing.assert_close(writes.residual_BD, stream, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.sum(1), stream @ directions.T, rtol=0, atol=1e-4)
    assert parts.shape == (3, len(components.all), 5)
    assert ("attention biases" in [component.name for component in components.all]) == (model.config.model_type == "gpt2")


@torch.no_grad()
def test_a_heads_part_is_what_the_block_loses_without_that_head(model):
    """Reference: zero the head's columns of the output projection of the first block, whose input it cannot change."""
    components = Components(model, 0)
    directions = torch.eye(32)
    parts = components.contributions(components.read(ids(), weights()), directions)
    seen = []
    attention = getattr(blocks(model)[0], "self_attn", None) or blocks(model)[0].attn
    handle = attention.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    capture(model, ids(), [0])
    projection = getattr(attention, "o_proj", None) or attention.c_proj
    columns = slice(8, 16)  # head 1 of 4, 8 wide
    (projection.weight[columns] if model.config.model_type == "gpt2" else projection.weight[:, columns]).zero_()
    capture(model, ids(), [0])
    handle.remove()
    lost = torch.einsum("bl,bld->bd", weights(), seen[0] - seen[1])
    torch.testing.assert_close(parts[:, components.all.index(Component("head", 0, 1))], lost, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_ablated_component_writes_its_mean_at_every_token_and_the_others_are_left(model):
    components = Components(model, 3)
    width = 32
    means = Means(torch.randn(4, width), torch.randn(4, width))
    chosen = [Component("head", 1, 2), Component("mlp", 2)]
    plain = components.read(ids(), weights())
    with components.ablate(chosen, means):
        logits = model(input_ids=ids()).logits
        seen = components.read(ids(), weights())
    assert not torch.allclose(model(input_ids=ids()).logits, logits), "the hooks are gone afterwards, and did something before"
    torch.testing.assert_close(seen.mlps_BND[:, 2], means.mlps_ND[2].expand(3, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.heads_BNI[:, 0], plain.heads_BNI[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(seen.heads_BNI[:, 1, :16], plain.heads_BNI[:, 1, :16], rtol=0, atol=0)
    torch.testing.assert_close(seen.mlps_BND[:, 0], plain.mlps_BND[:, 0], rtol=0, atol=0)


def test_a_block_of_another_layout_is_refused_by_name():
    model = tiny_model("llama")
    blocks(model)[0].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(ModelError, match="not Identity"):
        Components(model, 1)


def test_blocks_that_normalise_what_they_add_are_refused_and_so_are_offloaded_weights():
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    components = Components(AutoModelForCausalLM.from_config(config).eval(), 1)
    writes = components.read(ids(), weights())
    with pytest.raises(ModelError, match="Gemma2ForCausalLM: what heads and MLPs write does not add up to the residual stream"):
        components.contributions(writes, torch.eye(32))
    model = tiny_model("llama")
    blocks(model)[0].self_attn.o_proj.to("meta")
    with pytest.raises(ModelError, match="offloaded; set another"):
        Components(model, 0).contributions(writes, torch.eye(32))
