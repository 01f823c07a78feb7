from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import FAMILIES, tiny_folder, tiny_tokenizer
from tribunal.core.config import ModelConfig
from tribunal.core.errors import ModelError
from tribunal.models import loading, reasoner
from tribunal.models.describe import describe_model, load_format
from tribunal.models.loading import fits, folder_digest, identity, load_model, weight_bytes

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def config(path, **more) -> ModelConfig:
    return ModelConfig(name=str(path), **{"dtype": "float32", "device": "cpu", **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_saved(tmp_path, family):
    path = tiny_folder(tmp_path, family)
    loaded = load_model(config(path))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert torch.equal(loaded.model(IDS).logits, reference(IDS).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.n_layers, loaded.d_model, loaded.eos_ids, loaded.device.type) == (3, 32, (2,), "cpu")
    assert identity(loaded) == {"name": str(path), "revision": loaded.revision, "d_model": 32, "n_layers": 3}
    assert describe_model(config(path)) == loaded.shape == (3, 32, len(loaded.tokenizer), 512)
    assert load_model(config(path)) is loaded


def test_the_built_in_model_is_described_as_transformers_auto_classes_would():
    made, shape = load_format(config("builtin:addition"))
    folder = reasoner.folder()
    reference, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert shape == (reference.num_hidden_layers, reference.hidden_size, reference.vocab_size, reference.max_position_embeddings)
    text = reasoner.prompt("347 + 285 =") + "<think>7+5=12 write 2 carry 1</think>\nAnswer: 632<sep>y<eos>"
    assert made.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert made.tokenizer.get_vocab() == tokenizer.get_vocab() and made.tokenizer.special_tokens_map == tokenizer.special_tokens_map


def test_dtype_is_as_asked(tmp_path):
    assert load_model(config(tiny_folder(tmp_path), dtype="bfloat16")).model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_the_prompt_format_needs_no_weights(tmp_path, kind):
    path = tiny_folder(tmp_path, tokenizer=kind, chat=True)
    (path / "model.safetensors").unlink()
    made, shape = load_format(config(path))
    assert made.kind == "chat" and shape.n_layers == 3


def test_the_name_of_local_weights_changes_with_them(tmp_path):
    first, second = tiny_folder(tmp_path / "a"), tiny_folder(tmp_path / "b", seed=1)
    assert folder_digest(first) == folder_digest(tiny_folder(tmp_path / "c")) != folder_digest(second)
    assert load_model(config(first)).revision == folder_digest(first)


def one_line(path, **more) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(config(path, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_refused_in_one_line(tmp_path):
    assert "no such folder" in one_line(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in one_line(tmp_path / "empty")


def test_a_folder_without_weights_or_tokenizer_is_refused_in_one_line(tmp_path):
    path = tiny_folder(tmp_path)
    (path / "model.safetensors").unlink()
    assert "cannot load its weights" in one_line(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    assert "are its files (tokenizer.json, ...) with the model?" in one_line(path)


def test_a_hub_model_that_is_not_cached_says_what_to_do_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = one_line("nobody/nothing-7b", revision="0123456789012345678901234567890123456789")
    assert "nobody/nothing-7b" in message and "tribunal prefetch" in message


def test_a_hub_model_in_the_cache_loads_offline_and_records_its_commit(monkeypatch, tmp_path, caplog):
    """The cache's layout, made by hand: what a login node has fetched is enough."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    tiny_folder(repo / "snapshots", "qwen3").rename(repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(config("someone/tiny"))
    assert loaded.revision == commit
    assert f"put revision: {commit} into the experiment" in caplog.text
    caplog.clear()
    assert load_model(config("someone/tiny", revision=commit)).revision == commit
    assert not caplog.text


def test_a_tokenizer_of_another_model_is_refused_in_one_line(tmp_path):
    path = tiny_folder(tmp_path)
    bigger = tiny_tokenizer()
    bigger.add_tokens([f"<extra_{i}>" for i in range(10)])
    bigger.save_pretrained(path)
    message = one_line(path)
    assert f"ids up to {len(bigger) - 1}" in message and f"ends at {len(bigger) - 11}" in message


def test_chat_without_template_is_refused_before_the_weights_are_read(tmp_path):
    path = tiny_folder(tmp_path)
    (path / "model.safetensors").unlink()
    assert "no chat template" in one_line(path, prompt="chat")


def test_end_of_sequence_tokens_are_the_generation_configs(tmp_path):
    path = tiny_folder(tmp_path)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    assert load_model(config(path)).eos_ids == (2, 7)
    (path / "generation_config.json").unlink()
    loading._load.cache_clear()
    assert load_model(config(path)).eos_ids == (2,)


def test_a_model_split_by_device_map_gives_the_same_logits(tmp_path):
    """CPU and disk stand in for several devices: the same dispatch by accelerate."""
    path = tiny_folder(tmp_path, "llama")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    split = load_model(config(path, device_map={**where, "model.layers.1": "disk", "model.layers.2": "disk"})).model
    assert split.hf_device_map["model.layers.1"] == "disk"
    with torch.no_grad():
        assert torch.allclose(split(IDS).logits, load_model(config(path)).model(IDS).logits, atol=1e-5)


def test_a_model_split_by_device_map_samples_the_same(tmp_path):
    from tribunal.models.generation import Request, Sampler

    path = tiny_folder(tmp_path, "qwen3")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    split = load_model(config(path, device_map={**where, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}))
    wave = [Request(f"p{i}/0", [5, 6, 7 + i], 6, i) for i in range(5)]
    plain = load_model(config(path))
    got, expected = (list(Sampler(m.model, eos_ids=m.eos_ids, slots=2).run(wave)) for m in (split, plain))
    assert [d.tokens for step in got for d in step] == [d.tokens for step in expected for d in step]


def test_a_model_that_fits_one_gpu_is_not_split():
    assert fits(16 * 10**9, 24 * 10**9) and not fits(16 * 10**9, 16 * 10**9)


def test_weight_bytes_are_counted_without_weights(tmp_path):
    path = tiny_folder(tmp_path, "qwen2")
    model = load_model(config(path)).model
    assert weight_bytes(model.config, torch.bfloat16) == 2 * sum(p.numel() for p in model.parameters())


def test_an_adapter_is_merged_into_the_weights(tmp_path):
    from peft import LoraConfig, get_peft_model

    path = tiny_folder(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = load_model(config(path, adapter=str(tmp_path / "adapter")))
    plain = load_model(config(path))
    assert type(loaded.model) is type(plain.model)
    with torch.no_grad():
        assert torch.allclose(loaded.model(IDS).logits, tuned(IDS).logits, atol=1e-4)
        assert not torch.allclose(loaded.model(IDS).logits, plain.model(IDS).logits, atol=1e-2)
    assert loaded.name == f"{path}+{tmp_path / 'adapter'}" and loaded.revision.startswith(f"{plain.revision}+folder:")
    assert "no such folder" in one_line(path, adapter=str(tmp_path / "none"))


def test_the_builtin_reasoner_loads_by_name():
    loaded = load_model(ModelConfig(name="builtin:addition", dtype="float32", device="cpu"))
    assert (loaded.name, loaded.n_layers, loaded.d_model) == ("builtin:addition", 3, 128)
    assert loaded.format.tags == ("<think>", "</think>")
    with pytest.raises(ModelError, match="builtin:adition"):
        load_model(ModelConfig(name="builtin:adition"))
