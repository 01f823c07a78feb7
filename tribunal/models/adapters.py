"""LoRA adapters as PEFT keeps them: made anew, read from a published folder, told from those of another model, written.

An adapter lives inside the base model's own modules, so ``loaded.model`` with an adapter on it *is* the adapted model; the
base model is the same object with the adapter switched off (``peft.disable_adapter()``) or taken off again (``detach``).
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tribunal.core.config import hub_name
from tribunal.core.errors import ModelError
from tribunal.core.storage import link_or_copy, make_folder, storage_errors, write_atomic, write_json
from tribunal.models.loading import BUILTIN, LoadedModel
from tribunal.models.lora import LoraSettings

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
CONTENT = re.compile(r"folder:|[0-9a-f]{40}")
"""How a revision begins that names one content: a folder's digest, or a commit."""
_attached: weakref.WeakKeyDictionary[nn.Module, tuple[PeftModel, bool | None]] = weakref.WeakKeyDictionary()
"""By model, what is on it, and the setting that a Trainer turns off."""


def new_adapter(loaded: LoadedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Put a fresh, trainable adapter on the model; another one on it is taken off first.

    Its weights depend on ``seed`` alone (float32, also on a half-precision model) and change nothing until trained; the
    global generators are left as they were.

    Raises:
        ModelError: a named target module is not there.
    """
    detach(loaded.model)
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _quiet():
        torch.manual_seed(seed)
        try:
            peft: Any = get_peft_model(loaded.model, config)
        except ValueError as error:
            raise ModelError(
                f"LoRA targets {targets}: {' '.join(str(error).split())[:200]}; use all-linear or names of linear modules"
            ) from error
    _attach(peft, loaded)
    return peft


def load_adapter(loaded: LoadedModel, source: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model, its own or one that others published; another one on it is taken off first.

    Args:
        source: a PEFT folder, or the name of one on the hub.
        trainable: to go on training it.
    Raises:
        ModelError: there is no such adapter, or it belongs to another base model; names both.
    """
    detach(loaded.model)
    folder = find_adapter(source)
    require_base(folder, loaded.name, loaded.revision)
    try:
        with _quiet():
            peft = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        with contextlib.suppress(Exception):  # what PEFT had put on before it failed; the first error is the one to tell
            _strip(loaded.model)
        raise _misfit(folder, loaded, " ".join(str(error).split())[:200]) from error
    _attach(peft, loaded)
    theirs, ours = _stored(folder), set(adapter_state(peft))
    if strange := sorted(theirs ^ ours):
        detach(loaded.model)
        raise _misfit(folder, loaded, f"{len(strange)} tensors do not match, e.g. {strange[0]}")
    return peft


def require_fit(loaded: LoadedModel, source: str | Path) -> None:
    """Put an adapter on and take it off again, so that one which does not belong here is refused before any work.

    Raises:
        ModelError: see ``load_adapter``.
    """
    load_adapter(loaded, source)
    detach(loaded.model)


def detach(model: nn.Module) -> None:
    """Take the adapter off again: the model is as it was loaded."""
    known: Any = _attached.pop(model, None)
    if known is not None:
        peft, use_cache = known
        peft.unload()
        model.eval()
        if use_cache is not None:
            model.config.use_cache = use_cache  # type: ignore[union-attr]  # a PreTrainedModel


def find_adapter(source: str | Path) -> Path:
    """The folder of an adapter given by folder, or by its name on the hub (``name``, or ``name@commit`` where pinned).

    Raises:
        ModelError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"adapter: {source} holds no {CONFIG}; give a folder that PEFT's save_pretrained wrote")
        return path
    if not _on_the_hub(source):
        raise ModelError(f"adapter: no such folder: {source}")
    name, commit = hub_name(str(source))
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=["adapter_*", CARD]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"adapter: {source}: cannot be fetched ({reason}); run tribunal prefetch on a node with network, or give a folder"
        ) from error


def _on_the_hub(source: str | Path) -> bool:
    name = hub_name(str(source))[0]
    return not Path(source).expanduser().is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def require_base(folder: Path, name: str, revision: str | None = None) -> None:
    """Refuse an adapter that says it was trained on another model.

    The hub takes names in any case. A branch that an adapter names ("main") says nothing: only commits and contents are compared.

    Args:
        revision: of the model, where it is known: a local one's is told by its content.
    Raises:
        ModelError: names the two models.
    """
    config = _config(folder)
    base, theirs = config.get("base_model_name_or_path"), config.get("revision")
    same = bool(base) and str(base).lower() == name.lower()
    other = bool(base) and not same and not _local(str(base)) and not _local(name)
    if other or (revision and same and theirs and CONTENT.match(str(theirs)) and theirs != revision):
        trained = f"{base}@{theirs}" if theirs else base
        ours = f"{name}@{revision}" if revision else name
        raise ModelError(
            f"adapter: {folder} was trained on {trained}, but the model is {ours}; give the model it belongs to, or train another adapter"
        )


def refuse_foreign(sources: Iterable[str], model: str) -> None:
    """Refuse adapters in local folders that are none, or say that they are another model's, before any model is loaded.

    Raises:
        ModelError: names the adapter.
    """
    for source in sources:
        if not _on_the_hub(source):
            require_base(find_adapter(source), model)


def adapter_state(peft: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names that PEFT's files use."""
    return get_peft_model_state_dict(peft, save_embedding_layers=False)


def adapter_bytes(peft: PeftModel) -> bytes:
    """The weights as a safetensors file, the same bytes for the same weights."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(adapter_state(peft).items())}
    return save(tensors, metadata={"format": "pt"})


def publish_adapter(weights: Path, config: Mapping[str, Any], out: Path, card: str) -> None:
    """Write a PEFT folder that ``PeftModel.from_pretrained`` loads: weights (linked where possible), config and model card."""
    make_folder(out)
    link_or_copy(weights, out / WEIGHTS)
    write_json(out / CONFIG, config)
    write_atomic(out / CARD, card)


def portable_config(folder: Path, loaded_name: str, revision: str) -> dict[str, Any]:
    """The adapter's config with sorted lists and the base model's name in place of a path of this machine."""
    config = _config(folder)
    config |= {"base_model_name_or_path": loaded_name, "revision": revision, "inference_mode": True}
    return {key: sorted(value) if key == "target_modules" and isinstance(value, list) else value for key, value in config.items()}


def _attach(peft: Any, loaded: LoadedModel) -> None:
    _attached[loaded.model] = peft, getattr(loaded.model.config, "use_cache", None)
    for config in peft.peft_config.values():
        config.base_model_name_or_path, config.revision = loaded.name, loaded.revision


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    with storage_errors(path, "read"):
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ModelError(f"adapter: {path} is not JSON ({error}); give a folder that PEFT's save_pretrained wrote") from None
    if not isinstance(config, dict):
        raise ModelError(f"adapter: {path} holds no settings; give a folder that PEFT's save_pretrained wrote")
    return config


def _local(name: str) -> bool:
    """A folder's name or content says nothing about what else it is called."""
    return not name.startswith(BUILTIN) and (name.startswith((".", "/", "~", "folder:")) or name.count("/") != 1)


def _misfit(folder: Path, loaded: LoadedModel, reason: str) -> ModelError:
    base = _config(folder).get("base_model_name_or_path") or "an unnamed model"
    return ModelError(f"adapter: {folder} (of {base}) does not fit {loaded.name}: {reason}; give the model it was trained on")


def _stored(folder: Path) -> set[str]:
    path = folder / WEIGHTS
    if not path.is_file():  # an older adapter_model.bin: PEFT has checked its keys
        raise ModelError(f"adapter: {folder} holds no {WEIGHTS}; convert its weights to safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ModelError(f"adapter: {path}: {error}; the file is damaged: fetch or train it again") from error


def _strip(model: Any) -> None:
    """Take LoRA layers off a model whose PEFT wrapper was never finished."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.base_layer)
    vars(model).pop("peft_config", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of what is checked here, and of its own use of deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
