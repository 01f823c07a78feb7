"""Batched extraction against a plain forward per trace and an independent pooling."""

from __future__ import annotations

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_traces import make_label, make_pairs, make_trace
from tribunal.activations import extraction
from tribunal.activations.extraction import Extractor, default_layers, wanted_layers
from tribunal.activations.poolings import POOLINGS
from tribunal.core.errors import DataError, ModelError, UserError
from tribunal.models.bridge import BridgeReader

PAIRS = make_pairs(14)


def reference(model, pairs, layer, pooling):
    """One trace at a time, the whole model, numpy-style slicing written independently of the poolings module."""
    rows = []
    for trace, label in pairs:
        kept = []
        handle = (model.model.layers if hasattr(model, "model") else model.transformer.h)[layer].register_forward_hook(
            lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
        )
        with torch.no_grad():
            model(torch.tensor([trace.prompt_ids + trace.completion_ids]))
        handle.remove()
        prompt = kept[0][0][: len(trace.prompt_ids)]
        text = kept[0][0][len(trace.prompt_ids) :][: trace.readable]
        n = len(text)
        if pooling == "last":
            rows += [text[-1]]
        elif pooling == "last_10":
            rows += [text[-10:].mean(0)]
        elif pooling == "mean":
            rows += [text.mean(0)]
        elif pooling == "think_end":
            rows += [] if trace.thought_end is None or trace.thought_end >= n else [text[trace.thought_end]]
        elif pooling == "sentence":
            rows += [text[span.end_token - 1] for span in label.sentences]
        elif pooling == "percentile":
            rows += [text[max(1, -(-n * p // 100)) - 1] for p in range(10, 101, 10)]
        elif pooling == "token":
            rows += list(text)
        else:
            rows += [prompt[-1]]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_pooling_equals_a_plain_forward_of_each_trace(family, tmp_path):
    model = tiny_model(family, layers=4, spread=0.1)
    extractor = Extractor(model, layers=[1, 3], poolings=list(POOLINGS), store_dtype="float32", batch_tokens=150)
    got = extractor.extract(PAIRS)
    found = extractor.write_shard(tmp_path / "acts.safetensors", PAIRS)
    stored = load_file(tmp_path / "acts.safetensors")
    for layer in (0, 1, 3):
        for pooling in POOLINGS:
            expected = reference(model, PAIRS, layer, pooling)
            torch.testing.assert_close(got[layer, pooling], expected, rtol=0, atol=2e-5)
            assert torch.equal(stored[f"layer_{layer}.{pooling}"], got[layer, pooling])
            assert found.rows[pooling] == len(expected)
    assert found.absent["think_end"] == 14 - found.rows["think_end"] > 0
    assert found.absent["mean"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformer_lens_backend_gives_the_same_numbers(family):
    model = tiny_model(family, layers=4, spread=0.1)
    options = dict(layers=[1, 3], poolings=["mean", "last", "sentence"], store_dtype="float32", batch_tokens=150)
    ours = Extractor(model, **options).extract(PAIRS)
    lens = Extractor(model, **options, reader=BridgeReader(model))
    assert lens.self_check(PAIRS) < 1e-4
    assert all((rows - ours[name]).abs().max() <= 1e-4 for name, rows in lens.extract(PAIRS).items())


def test_layer_0_is_always_read_and_defaults_hold_middle_and_last():
    assert default_layers(36) == [0, 8, 17, 26, 35]
    assert default_layers(4) == [0, 1, 2, 3]
    assert default_layers(1) == [0]
    assert wanted_layers([7], 12) == [0, 7]
    assert wanted_layers("all", 3) == [0, 1, 2]
    assert wanted_layers(None, 5) == [0, 1, 2, 3, 4]


def test_no_token_after_the_last_one_that_a_row_needs_is_run():
    model, seen = tiny_model("qwen3", layers=4, spread=0.1), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    trace = make_trace("p", prompt=5, completion=30, readable=20)
    Extractor(model, layers=[0], poolings=["prompt_end"]).extract([(trace, make_label(trace))])
    Extractor(model, layers=[0], poolings=["last"]).extract([(trace, make_label(trace))])
    assert seen == [(1, 5, 32), (1, 25, 32)]


def test_batches_keep_to_the_budget_and_leave_no_trace_out():
    model, shapes = tiny_model("qwen3", layers=4, spread=0.1), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))
    Extractor(model, layers=[0], poolings=["mean"], batch_tokens=150).extract(PAIRS)
    assert sum(rows for rows, _ in shapes) == len(PAIRS)
    assert all(rows * width <= 150 or rows == 1 for rows, width in shapes)
    assert len(shapes) < len(PAIRS)


def failing_above(model, tokens, error=None):
    """A reader that runs out of memory above so many tokens, and records what it was asked for."""
    asked = []

    def read(ids, readers):
        asked.append(ids.numel())
        if ids.numel() > tokens:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        extraction.read_residual(model, ids, readers)

    return read, asked


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")]
)
def test_out_of_memory_halves_the_budget_and_loses_nothing(tmp_path, error):
    model = tiny_model("qwen3", layers=4, spread=0.1)
    options = dict(layers=[2], poolings=["mean", "token"], store_dtype="float32")
    expected = Extractor(model, **options).extract(PAIRS)
    reader, asked = failing_above(model, 100, error)
    found = Extractor(model, **options, batch_tokens=500, reader=reader)
    assert found.write_shard(tmp_path / "acts.safetensors", PAIRS).oom_halvings == 2
    stored = load_file(tmp_path / "acts.safetensors")
    for (layer, pooling), rows in expected.items():
        torch.testing.assert_close(stored[f"layer_{layer}.{pooling}"], rows, rtol=0, atol=2e-5)
    assert asked[:2] == [448, 192] and max(asked[2:]) <= 100


def test_a_trace_that_does_not_fit_alone_is_named_with_its_length():
    model = tiny_model("qwen3", layers=4, spread=0.1)
    reader, _ = failing_above(model, 30)
    trace = make_trace("long", prompt=5, completion=91, readable=90)
    with pytest.raises(UserError, match=r"trace long/0: 95 tokens do not fit the memory of cpu"):
        Extractor(model, layers=[2], poolings=["mean"], reader=reader).extract([(trace, make_label(trace)), *PAIRS[:2]])


def test_an_error_that_is_not_about_memory_is_not_swallowed():
    reader, _ = failing_above(tiny_model("qwen3", layers=4, spread=0.1), 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        Extractor(tiny_model("qwen3", layers=4, spread=0.1), poolings=["mean"], reader=reader).extract(PAIRS)


def scaled(factor):
    model = tiny_model("qwen3", layers=4, spread=0.1)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(factor)
    return model


def test_a_value_too_large_for_float16_is_an_error_that_names_trace_and_layer_not_inf():
    options = dict(layers=[1, 2], poolings=["last", "mean"])
    with pytest.raises(ModelError, match=r"trace p\d+/\d, blocks.2.hook_resid_post: \d+,\d+.* overflows float16 .*bfloat16"):
        Extractor(scaled(1e7), **options, store_dtype="float16").extract(PAIRS)
    assert all(torch.isfinite(rows).all() for rows in Extractor(scaled(1e7), **options, store_dtype="bfloat16").extract(PAIRS).values())


@pytest.mark.parametrize("store_dtype", ["float16", "float32"])
def test_nan_from_the_model_is_an_error(store_dtype):
    with pytest.raises(ModelError, match=r"blocks.2.hook_resid_post: the model itself gives NaN"):
        Extractor(scaled(float("nan")), layers=[1, 2], poolings=["last"], store_dtype=store_dtype).extract(PAIRS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_passes_on_a_sound_path_in_either_precision(dtype):
    for family in FAMILIES:
        model = tiny_model(family, layers=4, spread=0.1).to(dtype)
        assert Extractor(model, poolings=["mean", "last", "sentence"]).self_check(PAIRS) < extraction.TOLERANCE[dtype] / 2


def test_the_self_check_refuses_left_padding_without_a_mask():
    model = tiny_model("qwen3", layers=4, spread=0.1)

    def rolled(ids, readers):  # what a left-padding collator would run, rows read at the unshifted places
        extraction.read_residual(model, torch.roll(ids, 3, dims=1), readers)

    with pytest.raises(ModelError, match=r"self-check failed: trace p\d/\d, layer \d: batched activations differ"):
        Extractor(model, poolings=["mean", "last"], reader=rolled).self_check(PAIRS)


def test_a_token_id_outside_the_vocabulary_and_a_layer_out_of_range_are_refused():
    model = tiny_model("qwen3", layers=4, spread=0.1)
    trace = make_trace("p").model_copy(update={"completion_ids": [1, 500, 2], "readable": 3})
    with pytest.raises(DataError, match=r"trace p/0: token id 500, but the model has 97"):
        Extractor(model, poolings=["last"]).extract([(trace, make_label(trace))])
    with pytest.raises(ModelError, match=r"no layer 4; the model has 4 layers, 0 to 3"):
        Extractor(model, layers=[4], poolings=["last"])


def test_traces_without_any_row_are_counted_not_dropped(tmp_path):
    model = tiny_model("qwen3", layers=4, spread=0.1)
    empty = make_trace("empty", completion=1, readable=0)
    found = Extractor(model, poolings=["last", "think_end"]).write_shard(tmp_path / "acts", [(empty, make_label(empty)), *PAIRS[:2]])
    assert found.rows["last"] == 2 and found.absent["last"] == 1
    only = Extractor(model, poolings=["last"]).write_shard(tmp_path / "none", [(empty, make_label(empty))])
    assert only.rows == {"last": 0} and load_file(tmp_path / "none")["layer_0.last"].shape == (0, 32)


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_a_model_dispatched_over_devices_gives_the_same_rows(tmp_path, offloaded):
    """Two devices are not at hand: offloading by accelerate moves weights in and out around every block, by the same hooks."""
    model = tiny_model("qwen3", layers=4, spread=0.1)
    model.save_pretrained(tmp_path / "model")
    expected = Extractor(model, layers=[1, 3], poolings=["mean", "last"], store_dtype="float32").extract(PAIRS)
    split = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "cpu" if layer < 2 else offloaded for layer in range(4)}
    if offloaded == "disk":
        split = accelerate.dispatch_model(split, device_map, main_device="cpu", offload_dir=tmp_path / "offload")
    else:
        split = accelerate.cpu_offload(split, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in split.parameters())
    extractor = Extractor(split, layers=[1, 3], poolings=["mean", "last"], store_dtype="float32")
    assert extractor.self_check(PAIRS) < 1e-4
    for name, rows in extractor.extract(PAIRS).items():
        torch.testing.assert_close(rows, expected[name], rtol=0, atol=1e-6)
