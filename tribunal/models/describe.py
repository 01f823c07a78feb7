"""What is known of a model without its weights: where it lies, its shape, its tokenizer and its prompt format.

Submitting checks an experiment with this. It imports torch only where transformers' Auto classes do (for every model but the
built-in one), and none of the modelling code, which takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from tribunal.core.config import ModelConfig
from tribunal.core.errors import ModelError
from tribunal.core.registry import nearest
from tribunal.core.storage import read_json
from tribunal.models.formats import PromptFormat, builtin_format, make_format

log = logging.getLogger(__name__)
BUILTIN = "builtin:"


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


class Described(NamedTuple):
    """A model's files, checked against each other; ``eos_ids`` end a completion."""

    source: Source
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    eos_ids: tuple[int, ...]


def describe(config: ModelConfig) -> Described:
    """Everything but the weights.

    Raises:
        ModelError: there is no such model or template, or config and tokenizer do not belong together.
    """
    source = find(config)
    shape = _shape(source, config)
    tokenizer = _tokenizer(source, shape, config)
    eos_ids = _eos_ids(source, tokenizer)
    built = builtin_format(tokenizer, config) if _is_builtin(config) else make_format(config, tokenizer, eos_ids)
    return Described(source, shape, tokenizer, built, eos_ids)


def describe_model(config: ModelConfig) -> ModelShape:
    """Number of layers, widths and context from the model's config alone."""
    return _shape(find(config), config)


def load_format(config: ModelConfig) -> tuple[PromptFormat, ModelShape]:
    """Prompt format and shape, for refusing bad input early."""
    described = describe(config)
    return described.format, described.shape


def hf_config(source: Source) -> Any:
    """transformers' configuration of a model."""
    from transformers import AutoConfig  # imports torch

    path, pinned = source.arguments()
    with one_line(path, "config", local=source.local):
        return AutoConfig.from_pretrained(path, **pinned)


def find(config: ModelConfig) -> Source:
    """Resolve a model's name to a folder or a pinned commit on the hub.

    Raises:
        ModelError: a folder that does not exist, or an unknown built-in model.
    """
    if _is_builtin(config):
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
    with one_line(name, "config", local=False):
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


def _is_builtin(config: ModelConfig) -> bool:
    return config.name.startswith(BUILTIN)


def _shape(source: Source, config: ModelConfig) -> ModelShape:
    if _is_builtin(config):
        ours = read_json(Path(source.path) / "config.json")
        return ModelShape(ours["num_hidden_layers"], ours["hidden_size"], ours["vocab_size"], ours["max_position_embeddings"])
    text = hf_config(source).get_text_config()
    return ModelShape(text.num_hidden_layers, text.hidden_size, text.vocab_size, getattr(text, "max_position_embeddings", None))


def _tokenizer(source: Source, shape: ModelShape, config: ModelConfig) -> PreTrainedTokenizerBase:
    path, pinned = source.arguments()
    with one_line(config.name, "tokenizer", local=source.local):
        if _is_builtin(config):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            from transformers import AutoTokenizer  # imports torch

            tokenizer = AutoTokenizer.from_pretrained(path, **pinned)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= shape.vocab_size:
        raise ModelError(
            f"{config.name}: tokenizer and model do not belong together: the tokenizer has ids up to {highest}, "
            f"the model's vocabulary ends at {shape.vocab_size - 1}; use the tokenizer that the model was trained with"
        )
    return tokenizer


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
def one_line(name: str, what: str, *, local: bool) -> Iterator[None]:
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
