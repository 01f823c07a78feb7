"""Adapters: on and off the model, written as PEFT reads them, refused where they do not belong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.tiny_models import tiny_folder
from tribunal.core.config import ModelConfig
from tribunal.core.errors import ModelError
from tribunal.models import adapters
from tribunal.models.adapters import (
    adapter_bytes,
    detach,
    find_adapter,
    load_adapter,
    new_adapter,
    portable_config,
    publish_adapter,
)
from tribunal.models.loading import LoadedModel, load_model
from tribunal.models.lora import LoraSettings
from tribunal.oracle.settings import adapter_digest

IDS = torch.arange(3, 13)[None]
SMALL = LoraSettings(rank=2, alpha=4, dropout=0.0)


def load(folder: Path, **shape: int) -> LoadedModel:
    return load_model(ModelConfig(name=str(tiny_folder(folder, **shape)), dtype="float32", device="cpu"))


@pytest.fixture
def loaded(tmp_path):
    return load(tmp_path)


def trained(loaded: LoadedModel) -> PeftModel:
    """An adapter that changes the output: its second factors, zero at first, are drawn."""
    peft = new_adapter(loaded, SMALL, seed=1)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(2))
    return peft


def published(peft: PeftModel, loaded: LoadedModel, folder: Path) -> Path:
    peft.save_pretrained(folder / "saved", save_embedding_layers=False)
    (folder / "weights").write_bytes(adapter_bytes(peft))
    publish_adapter(folder / "weights", portable_config(folder / "saved", loaded.name, loaded.revision), folder / "out", "card")
    return folder / "out"


def test_a_published_folder_is_loaded_by_peft_itself_and_says_the_same(loaded, tmp_path):
    peft = trained(loaded)
    expected = loaded.model(IDS).logits
    out = published(peft, loaded, tmp_path)
    with peft.disable_adapter():
        off = loaded.model(IDS).logits
    detach(loaded.model)
    assert torch.equal(loaded.model(IDS).logits, off) and not torch.equal(off, expected)
    by_peft = PeftModel.from_pretrained(loaded.model, str(out))
    assert torch.equal(by_peft(IDS).logits, expected)
    by_peft.unload()
    load_adapter(loaded, out)
    assert torch.equal(loaded.model(IDS).logits, expected)


def test_a_new_adapter_depends_on_its_seed_alone_and_leaves_the_generator_as_it_was(loaded):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = adapter_bytes(new_adapter(loaded, SMALL, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    assert adapter_bytes(new_adapter(loaded, SMALL, seed=1)) == first
    assert adapter_bytes(new_adapter(loaded, SMALL, seed=2)) != first


def test_the_published_config_names_the_model_and_no_path_and_has_one_order(loaded, tmp_path):
    out = published(trained(loaded), loaded, tmp_path)
    config = json.loads((out / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == loaded.name and config["revision"] == loaded.revision
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_adapter_of_another_shape_is_refused_in_one_line_and_leaves_the_model_untouched(loaded, tmp_path):
    plain = loaded.model(IDS).logits
    for name, shape in {"wide": {"width": 64}, "deep": {"layers": 4}}.items():
        other = load(tmp_path / name, **shape)
        out = published(trained(other), other, tmp_path / name)
        with pytest.raises(ModelError, match="does not fit") as error:
            load_adapter(loaded, out)
        assert "\n" not in str(error.value)
        assert torch.equal(loaded.model(IDS).logits, plain)


def test_an_adapter_that_names_another_model_is_refused(loaded, tmp_path):
    out = published(trained(loaded), loaded, tmp_path)
    builtin = load_model(ModelConfig(name="builtin:addition", dtype="float32"))
    config = json.loads((out / adapters.CONFIG).read_text())
    (out / adapters.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "Qwen/Qwen3-8B"}))
    with pytest.raises(ModelError, match=r"was trained on Qwen/Qwen3-8B.*but the model is builtin:addition"):
        load_adapter(builtin, out)
    (out / adapters.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": builtin.name, "revision": "folder:0"}))
    with pytest.raises(ModelError, match="builtin:addition@folder:0"):
        load_adapter(builtin, out)


@pytest.mark.parametrize(
    ("base", "revision", "fits"),
    [("Qwen/Qwen3-8B", None, True), ("Qwen/Qwen3-8B", "main", True), ("qwen/qwen3-8b", "a" * 40, True), ("Qwen/Qwen3-8B", "b" * 40, False),
     ("Qwen/Qwen3-8B-Base", None, False)],
)  # fmt: skip
def test_a_branch_that_an_adapter_names_and_the_case_of_a_name_say_nothing_of_its_base(tmp_path, base, revision, fits):
    (tmp_path / adapters.CONFIG).write_text(json.dumps({"base_model_name_or_path": base, "revision": revision}))
    with contextlib.nullcontext() if fits else pytest.raises(ModelError, match="was trained on"):
        adapters.require_base(tmp_path, "Qwen/Qwen3-8B", "a" * 40)


def test_an_adapter_on_the_hub_is_fetched_at_the_commit_that_pins_it_and_named_by_it(loaded, tmp_path, monkeypatch):
    out, asked = published(trained(loaded), loaded, tmp_path), []
    monkeypatch.setattr(adapters, "snapshot_download", lambda name, revision, allow_patterns: asked.append((name, revision)) or str(out))
    load_adapter(loaded, "someone/oracle@abc123")
    assert find_adapter("someone/oracle") == out
    assert asked == [("someone/oracle", "abc123"), ("someone/oracle", None)]
    assert adapter_digest("someone/oracle@abc123") != adapter_digest("someone/oracle@abc124")


def test_a_folder_without_an_adapter_is_refused(loaded, tmp_path):
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        load_adapter(loaded, tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        load_adapter(loaded, tmp_path / "nothing")
