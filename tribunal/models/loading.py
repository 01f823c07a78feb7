"""Load a model with its tokenizer and prompt format: from the hub by name and commit, from a folder, or the built-in one.

Works offline (``HF_HUB_OFFLINE=1``) from the cache. A model that fits one GPU is never split over several devices.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from tribunal.core.config import ModelConfig
from tribunal.core.errors import ModelError
from tribunal.core.registry import nearest
from tribunal.models.formats import PromptFormat, builtin_format, make_format

log = logging.getLogger(__name__)
BUILTIN = "builtin:"
WEIGHT_SHARE = 0.8
"""A model whose weights take up to this share of a GPU's memory fits it: the rest is left to activations and cache."""


class Source(NamedTuple):
    """Where a model comes from: a folder, or a name on the hub at a commit."""

    path: str
    commit: str | None

    @property
    def local(self) -> bool:
        return self.commit is None

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What ``from_pretrained`` takes."""
        return self.path, {} if self.commit is None else {"revision": self.commit}


class ModelShape(NamedTuple):
    """What is known of a model without its weights."""

    n_layers: int
    d_model: int
    vocab_size: int
    max_positions: int | None


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
    """Load a model once per process.

    Raises:
        ModelError: there is no such model, adapter or template, or model and tokenizer do not belong together.
    """
    return _load(config.model_dump_json())


def describe_model(config: ModelConfig) -> ModelShape:
    """Number of layers, widths and context from the model's config alone (no weights are read)."""
    return _shape(_config_of(find(config)))


def load_format(config: ModelConfig) -> tuple[PromptFormat, ModelShape]:
    """Tokenizer, prompt format and shape without weights, checked against each other: for refusing bad input early."""
    source = find(config)
    shape = _shape(_config_of(source))
    tokenizer = _tokenizer_of(source, shape, config.name)
    return _format(config, tokenizer, _eos_ids(source, tokenizer)), shape


def find(config: ModelConfig) -> Source:
    """Resolve a model's name to a folder or a pinned commit on the hub.

    Raises:
        ModelError: a folder that does not exist, or an unknown built-in model.
    """
    if config.name.startswith(BUILTIN):
        if config.name != "builtin:addition":
            raise ModelError(f"model.name: unknown built-in model '{config.name}'; {nearest(config.name, ['builtin:addition'])}")
        from tribunal.models import reasoner

        return Source(str(_folder(reasoner.folder(), config.name)), None)
    path = Path(config.name).expanduser()
    if path.is_dir():
        return Source(str(_folder(path, config.name)), None)
    if config.name.startswith((".", "/", "~")) or config.name.count("/") != 1:
        raise ModelError(
            f"model.name: no such folder: {config.name}; give a folder with config.json, or a Hugging Face name like Qwen/Qwen3-8B"
        )
    return Source(config.name, _commit(config.name, config.revision))


@functools.lru_cache
def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch, tag or (None) the main branch stands for, so that all files come from one."""
    with _one_line(name, "config", local=False):
        found = cached_file(name, "config.json", revision=revision or "main")
    commit = Path(found or "").parent.name
    if revision != commit:
        log.warning("model.revision: %s is not pinned (given: %s); put revision: %s into the experiment", name, revision, commit)
    return commit


def _folder(path: Path, name: str) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.name: {name}: {path} holds no config.json; a Hugging Face model folder has config, weights and tokenizer files"
        )
    return path


@functools.lru_cache(maxsize=2)
def _load(config_json: str) -> LoadedModel:
    config = ModelConfig.model_validate_json(config_json)
    source = find(config)
    hf_config = _config_of(source)
    shape = _shape(hf_config)
    tokenizer = _tokenizer_of(source, shape, config.name)
    eos_ids = _eos_ids(source, tokenizer)
    prompt_format = _format(config, tokenizer, eos_ids)
    device = _device(config)
    placement = _placement(config, hf_config, device)
    path, pinned = source.arguments()
    with _one_line(config.name, "weights", local=source.local), _progress_bar(not config.name.startswith(BUILTIN)):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **pinned, **placement)
    name, revision = config.name, source.commit or folder_digest(Path(path))
    if config.adapter:
        model, adapter_revision = _merge_adapter(model, config.adapter)
        name, revision = f"{name}+{config.adapter}", f"{revision}+{adapter_revision}"
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return LoadedModel(model, tokenizer, prompt_format, name, revision, shape, device, eos_ids)


def _shape(hf_config: Any) -> ModelShape:
    text = hf_config.get_text_config()
    return ModelShape(text.num_hidden_layers, text.hidden_size, text.vocab_size, getattr(text, "max_position_embeddings", None))


def _config_of(source: Source) -> Any:
    path, pinned = source.arguments()
    with _one_line(path, "config", local=source.local):
        return AutoConfig.from_pretrained(path, **pinned)


def _tokenizer_of(source: Source, shape: ModelShape, name: str) -> PreTrainedTokenizerBase:
    path, pinned = source.arguments()
    with _one_line(name, "tokenizer", local=source.local):
        tokenizer = AutoTokenizer.from_pretrained(path, **pinned)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= shape.vocab_size:
        raise ModelError(
            f"{name}: tokenizer and model do not belong together: the tokenizer has ids up to {highest}, "
            f"the model's vocabulary ends at {shape.vocab_size - 1}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _format(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> PromptFormat:
    return builtin_format(tokenizer, config) if config.name.startswith(BUILTIN) else make_format(config, tokenizer, eos_ids)


def _eos_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the generation config's, as ``generate`` uses them, else the tokenizer's."""
    path, pinned = source.arguments()
    try:
        given = GenerationConfig.from_pretrained(path, **pinned).eos_token_id
    except OSError:  # the model brings no generation config
        given = None
    if given is None:
        given = tokenizer.eos_token_id
    return () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)


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


@contextlib.contextmanager
def _one_line(name: str, what: str, *, local: bool) -> Iterator[None]:
    """Turn what ``from_pretrained`` raises for missing or broken files into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        if local:
            cure = "the folder must hold config.json, safetensors weights and the tokenizer's files, as save_pretrained writes them"
        elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            cure = (
                "hub access is off here: run `tribunal prefetch EXPERIMENT` on a node with network and this HF_HOME, or give a local folder"
            )
        else:
            cure = "check the name and revision, log in for a gated model, or give a local folder"
        raise ModelError(f"model.name: {name}: cannot load its {what} ({reason}); {cure}") from error


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


def _placement(config: ModelConfig, hf_config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that decide where the weights go."""
    if config.device_map is None:
        return {"device_map": {"": device}}
    if isinstance(config.device_map, str) and device.type == "cuda":
        needed = weight_bytes(hf_config, getattr(torch, config.dtype))
        if fits(needed, torch.cuda.get_device_properties(device).total_memory):
            log.info("model.device_map=%s not used: the model fits one GPU (%.1f GB of weights)", config.device_map, needed / 1e9)
            return {"device_map": {"": device}}
    folder = tempfile.mkdtemp(prefix="tribunal-offload-")  # for weights that a map puts on the disk
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": config.device_map, "offload_folder": folder}


def fits(needed: int, memory: int) -> bool:
    """Whether weights of ``needed`` bytes leave room to work on a GPU of ``memory`` bytes."""
    return needed <= WEIGHT_SHARE * memory


def weight_bytes(hf_config: Any, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from its config (it is built without memory)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _merge_adapter(model: PreTrainedModel, adapter: str) -> tuple[PreTrainedModel, str]:
    """Fold a PEFT adapter into the weights; returns the plain model and the adapter's content hash."""
    from peft import PeftModel

    path = Path(adapter).expanduser()
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ModelError(f"model.adapter: {adapter} holds no adapter_config.json; give a folder that PEFT's save_pretrained wrote")
    if not path.is_dir() and (adapter.startswith((".", "/", "~")) or adapter.count("/") != 1):
        raise ModelError(f"model.adapter: no such folder: {adapter}")
    try:
        merged = PeftModel.from_pretrained(model, str(path) if path.is_dir() else adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.adapter: {adapter} cannot be put on this model ({reason}); was it trained on another one?") from error
    return merged, folder_digest(path) if path.is_dir() else "hub"
