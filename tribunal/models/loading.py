"""Load a model with its tokenizer and prompt format: from the hub by name and commit, from a folder, or the built-in one.

Works offline (``HF_HUB_OFFLINE=1``) from the cache. A model that fits one GPU is never split over several devices.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from tribunal.core.config import ModelConfig, hub_name
from tribunal.core.errors import ModelError
from tribunal.models.describe import BUILTIN, ModelShape, Source, describe, hf_config, one_line
from tribunal.models.formats import PromptFormat

log = logging.getLogger(__name__)
WEIGHT_SHARE = 0.8
"""A model whose weights take up to this share of a GPU's memory fits it: the rest is left to activations and cache."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with everything needed to ask it and to name it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    name: str
    revision: str
    shape: ModelShape
    device: torch.device
    eos_ids: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return self.shape.n_layers

    @property
    def d_model(self) -> int:
        return self.shape.d_model


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """What results say of the model they came from."""
    return {"name": loaded.name, "revision": loaded.revision, "d_model": loaded.d_model, "n_layers": loaded.n_layers}


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model once per process (until ``forget_models``).

    Raises:
        ModelError: there is no such model, adapter or template, or model and tokenizer do not belong together.
    """
    return _load(config.model_dump_json())


def forget_models() -> None:
    """Load models anew from here on: one that was loaded before is no longer as it was."""
    _load.cache_clear()


@functools.lru_cache(maxsize=2)
def _load(config_json: str) -> LoadedModel:
    config = ModelConfig.model_validate_json(config_json)
    source, shape, tokenizer, prompt_format, eos_ids = describe(config)
    device = _device(config)
    placement = _placement(config, source, device)
    path, pinned = source.arguments()
    with one_line(config.name, "weights", local=source.local), _progress_bar(not config.name.startswith(BUILTIN)):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **pinned, **placement)
    name, revision = config.name, source.commit or folder_digest(Path(path))
    if config.adapter:
        model, adapter_revision = _merge_adapter(model, config.adapter)
        name, revision = f"{name}+{config.adapter}", f"{revision}+{adapter_revision}"
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return LoadedModel(model, tokenizer, prompt_format, name, revision, shape, device, eos_ids)


@contextlib.contextmanager
def _progress_bar(wanted: bool) -> Iterator[None]:
    """Hide transformers' loading bar where it would only flash up."""
    shown = hf_logging.is_progress_bar_enabled()
    if not wanted:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def folder_digest(folder: Path) -> str:
    """Names a local model by its content: ``folder:`` and 16 hex digits.

    Small files are hashed whole; of a file above 64 MiB its size and 64 evenly spread 64-KiB pieces, so that a
    16-GB model takes no minute. Any real change of weights changes the pieces.
    """
    total = hashlib.sha256()
    wanted = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt")
    for path in sorted({path for pattern in wanted for path in folder.glob(pattern)}):
        size = path.stat().st_size
        total.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 64 << 20:
                total.update(file.read())
            else:
                for i in range(64):
                    file.seek((size - (64 << 10)) * i // 63)
                    total.update(file.read(64 << 10))
    return f"folder:{total.hexdigest()[:16]}"


def _device(config: ModelConfig) -> torch.device:
    if config.device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ModelError(f"model.device: {config.device!r} is no device; use cuda, cuda:1 or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"model.device: {config.device!r}, but {torch.cuda.device_count()} GPUs are visible; leave it out to use what is there"
        )
    return device


def _placement(config: ModelConfig, source: Source, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that decide where the weights go."""
    if config.device_map is None:
        return {"device_map": {"": device}}
    if isinstance(config.device_map, str) and device.type == "cuda":
        needed = weight_bytes(hf_config(source), getattr(torch, config.dtype))
        if fits(needed, torch.cuda.get_device_properties(device).total_memory):
            log.info("model.device_map=%s not used: the model fits one GPU (%.1f GB of weights)", config.device_map, needed / 1e9)
            return {"device_map": {"": device}}
    folder = tempfile.mkdtemp(prefix="tribunal-offload-")  # for weights that a map puts on the disk
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": config.device_map, "offload_folder": folder}


def fits(needed: int, memory: int) -> bool:
    """Whether weights of ``needed`` bytes leave room to work on a GPU of ``memory`` bytes."""
    return needed <= WEIGHT_SHARE * memory


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from its config (it is built without memory)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _merge_adapter(model: PreTrainedModel, adapter: str) -> tuple[PreTrainedModel, str]:
    """Fold a PEFT adapter into the weights; returns the plain model and the adapter's content hash."""
    from peft import PeftModel

    path = Path(adapter).expanduser()
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ModelError(f"model.adapter: {adapter} holds no adapter_config.json; give a folder that PEFT's save_pretrained wrote")
    if not path.is_dir() and (adapter.startswith((".", "/", "~")) or adapter.count("/") != 1):
        raise ModelError(f"model.adapter: no such folder: {adapter}")
    name, commit = (str(path), None) if path.is_dir() else hub_name(adapter)
    try:
        merged = PeftModel.from_pretrained(model, name, revision=commit).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.adapter: {adapter} cannot be put on this model ({reason}); was it trained on another one?") from error
    return merged, folder_digest(path) if path.is_dir() else commit or "hub"
