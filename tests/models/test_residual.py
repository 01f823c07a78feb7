"""The one residual hook: what it reads, what it may change, and that it leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import FAMILIES, tiny_model
from tribunal.core.errors import ModelError
from tribunal.models.bridge import BridgeReader
from tribunal.models.residual import Change, Gate, Steering, blocks, capture, inject, plain_forward, residual_hooks


def hooks_on(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param, layers=4, spread=0.1)


@torch.no_grad()
def test_inner_layers_equal_hidden_states_and_the_last_is_taken_before_the_final_norm(model):
    seen = capture(model, ids(), range(4))
    hidden = model(ids(), output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):
        torch.testing.assert_close(seen[layer], hidden[layer + 1], rtol=0, atol=1e-5)
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    assert (seen[3] - hidden[4]).abs().max() > 0.1
    torch.testing.assert_close(norm(seen[3]), hidden[4], rtol=0, atol=1e-5)


def test_nothing_runs_after_the_deepest_wanted_block(model):
    ran = []
    handles = [block.register_forward_hook(lambda *_, n=number: ran.append(n)) for number, block in enumerate(blocks(model))]
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    capture(model, ids(), [0, 2])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]


@torch.no_grad()
def test_right_padding_without_a_mask_leaves_real_tokens_as_they_are(model):
    padded = torch.cat([ids(1), torch.zeros(1, 9, dtype=torch.long)], dim=1)
    alone, batched = capture(model, ids(1), [3])[3], capture(model, padded, [3])[3]
    torch.testing.assert_close(batched[:, :11], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_edit_replaces_what_later_blocks_and_inner_hooks_see(model):
    shift = torch.ones(32)
    plain = capture(model, ids(), [1, 2])
    with residual_hooks(model, {1: lambda hidden: hidden + shift}):
        edited = capture(model, ids(), [1, 2])
    torch.testing.assert_close(edited[1], plain[1] + shift)
    assert (edited[2] - plain[2]).abs().max() > 0.1
    torch.testing.assert_close(capture(model, ids(), [2])[2], plain[2])


def test_hooks_are_gone_when_the_forward_or_the_caller_fails(model):
    before = hooks_on(model)
    with pytest.raises(RuntimeError, match="mine"), residual_hooks(model, {0: lambda hidden: None}):
        raise RuntimeError("mine")
    with pytest.raises(IndexError):
        capture(model, torch.tensor([[10_000]]), [1])
    capture(model, ids(), [1])
    assert hooks_on(model) == before


def test_a_layer_out_of_range_is_refused_with_the_layer_count(model):
    before = hooks_on(model)
    with pytest.raises(ModelError, match=r"layer 4: the model has 4 layers, 0 to 3"):
        capture(model, ids(), [0, 4])
    assert hooks_on(model) == before


def test_a_model_without_a_list_of_blocks_is_refused_by_name():
    with pytest.raises(ModelError, match="Linear: no list of blocks"):
        blocks(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_a_peft_model_is_read_with_its_adapter():
    torch.manual_seed(0)
    wrapped = get_peft_model(
        tiny_model("qwen3", layers=4, spread=0.1), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    seen = capture(wrapped, ids(), [1, 3])
    with wrapped.disable_adapter():
        assert (capture(wrapped, ids(), [3])[3] - seen[3]).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    for layer, hidden in capture(merged, ids(), [1, 3]).items():
        torch.testing.assert_close(hidden, seen[layer], rtol=0, atol=1e-5)


def test_the_plain_forward_agrees_with_the_hooks(model):
    plain = plain_forward(model, ids(1)[0].tolist(), [0, 3])
    for layer, hidden in capture(model, ids(1), [0, 3]).items():
        torch.testing.assert_close(plain[layer], hidden[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop_early", [True, False])
def test_the_transformer_lens_bridge_reads_the_same_and_leaves_the_model_alone(model, stop_early):
    before = capture(model, ids(), [0, 2, 3])
    seen: dict[int, torch.Tensor] = {}
    reader = BridgeReader(model, stop_early=stop_early)
    padded = torch.cat([ids(), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    reader(padded, {layer: lambda hidden, layer=layer: seen.__setitem__(layer, hidden) for layer in before})
    for layer, hidden in before.items():
        assert (seen[layer][:, :11] - hidden).abs().max() <= 1e-4
    assert all(torch.equal(capture(model, ids(), [layer])[layer], hidden) for layer, hidden in before.items())
    assert model.config._attn_implementation == "sdpa"


def vectors(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("norm_matched", [True, False])
@torch.no_grad()
def test_injection_follows_its_formula_at_ragged_places_and_nowhere_else(model, mode, norm_matched):
    rows, positions, put = torch.tensor([0, 0, 1]), torch.tensor([2, 3, 5]), vectors(3)
    plain = capture(model, ids(), [1])[1]
    with inject(model, put, rows, positions, layer=1, scale=2.0, mode=mode, norm_matched=norm_matched):
        seen = capture(model, ids(), [1])[1]
    expected = plain.clone()
    for row, position, vector in zip(rows.tolist(), positions.tolist(), put):
        h = plain[row, position]
        added = 2.0 * (h.norm() * vector / vector.norm() if norm_matched else vector)
        expected[row, position] = added + h if mode == "add" else added
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    assert hooks_on(model) == 0


@torch.no_grad()
def test_zero_vectors_add_nothing_and_cached_generation_is_injected_in_its_prompt_only(model):
    with inject(model, torch.zeros(1, 32), torch.tensor([0]), torch.tensor([4])):
        torch.testing.assert_close(capture(model, ids(), [3])[3], capture(model, ids(), [3])[3], rtol=0, atol=0)
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with inject(model, 30 * vectors(1), torch.tensor([0]), torch.tensor([4]), norm_matched=False):
        cached, whole = (model.generate(ids(1), use_cache=use, **given) for use in (True, False))
    assert cached.tolist() == whole.tolist()


def test_gradients_flow_through_the_state_and_never_into_what_is_injected(model):
    put = vectors(1).requires_grad_()
    with inject(model, put, torch.tensor([1]), torch.tensor([3])):
        model(input_ids=ids()).logits.sum().backward()
    assert put.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in blocks(model)[0].parameters())


@torch.no_grad()
def test_each_row_is_steered_as_it_was_aimed_and_from_its_own_start(model):
    a, b = vectors(2)
    steering = Steering({"add": [Change(1, add_D=3 * a)], "out": [Change(1, remove_D=5 * b), Change(2, remove_D=b)]})
    plain = capture(model, ids(3), [1])[1]
    with residual_hooks(model, steering.edits()):
        steering.aim(["add", "", "out"], [4, 0, 6])
        seen = capture(model, ids(3), [1, 2])
    tokens = torch.arange(11)
    torch.testing.assert_close(seen[1][0], plain[0] + 3 * a * (tokens >= 4)[:, None], rtol=0, atol=1e-5)
    assert torch.equal(seen[1][1], plain[1])
    assert torch.equal(seen[1][2, :6], plain[2, :6])
    for layer in (1, 2):
        assert (seen[layer][2, 6:] @ b).abs().max() < 1e-4 * b.norm() * seen[layer].norm(dim=-1).max()
    assert (plain[2, 6:] @ b).abs().max() > 0.1


@torch.no_grad()
def test_a_gate_lets_only_tokens_below_its_threshold_be_changed(model):
    a, g = vectors(2)
    plain = capture(model, ids(1), [2])[2]
    below = float((plain @ g).flatten().sort().values[4:6].mean())  # between two tokens
    steering = Steering({"gated": [Change(2, add_D=a, gate=Gate(g, below))]})
    with residual_hooks(model, steering.edits()):
        steering.aim(["gated"])
        seen = capture(model, ids(1), [2])[2]
    moved = (seen - plain).abs().amax(-1) > 0
    assert torch.equal(moved, plain @ g < below)
    assert 0 < moved.sum() < moved.numel()
