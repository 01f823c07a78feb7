"""How a problem becomes a prompt, and how sampled token ids are read back.

Token ids are the artefact; text is derived from them here and nowhere else. Thinking tags are matched in decoded
text, since ``</think>`` is one token in some vocabularies and several in others, and may merge with its neighbours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from tribunal.core.config import ModelConfig
from tribunal.core.errors import ConfigError, ModelError
from tribunal.core.records import Problem

KNOWN_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Thinking tags that are taken from a tokenizer that knows them (vocabulary or chat template)."""


class Reading(NamedTuple):
    """A completion, read. The fields are those of ``tribunal.core.records.Trace``."""

    thought: str
    response: str
    thought_end: int | None
    readable: int


@dataclass(frozen=True)
class PromptFormat:
    """One model's way of being asked and read.

    Attributes:
        kind: ``chat`` uses the tokenizer's chat template, ``pattern`` puts the question into ``pattern``.
        suffix: text added to each question, on a line of its own.
        tags: opening and closing thinking tag, None for a model that does not think aloud.
        end_ids: what follows the first of these (itself included) may not be read: end of sequence, a self-report.
        hidden_ids: special tokens that are no text and are left out of it.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Literal["chat", "pattern"]
    pattern: str = "{question}"
    suffix: str = ""
    tags: tuple[str, str] | None = None
    end_ids: frozenset[int] = frozenset()
    hidden_ids: frozenset[int] = field(default=frozenset(), repr=False)

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The prompt's token ids, with one beginning-of-sequence token where the model's own format has one.

        A problem of kind ``continuation`` is plain text for the model to go on with, whatever the format.
        """
        if problem.kind == "continuation":
            return self._encode(problem.question)
        question = f"{problem.question}\n{self.suffix}" if self.suffix else problem.question
        if self.kind == "pattern":
            return self._encode(self.pattern.replace("{question}", question))
        messages = [{"role": "user", "content": question}]
        ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    @property
    def template_sha256(self) -> str:
        """Of everything that shapes a prompt or its reading."""
        template = self.tokenizer.chat_template if self.kind == "chat" else self.pattern
        return hashlib.sha256(json.dumps([self.kind, template, self.suffix, self.tags]).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; tokens that are no text (end of sequence, ...) are left out, thinking tags are kept."""
        shown = [i for i in ids if i not in self.hidden_ids]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def read(self, completion_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> Reading:
        """Split a completion into thought and response at its last closing tag.

        A thought that never closes leaves the response empty. A thinking model that answers without a thought (no
        opening tag at the start of the completion, none left open in the prompt) has an empty thought.

        Args:
            prompt_ids: what was asked; some templates open the thought there.
        """
        readable = next((n for n, i in enumerate(completion_ids) if i in self.end_ids), len(completion_ids))
        ids = completion_ids[:readable]
        text = self.decode(ids)
        if self.tags is None:
            return Reading("", text, None, readable)
        opening, closing = self.tags
        opened = text.lstrip().startswith(opening)
        body = text.lstrip()[len(opening) :] if opened else text
        before, tag, after = body.rpartition(closing)
        if tag:
            end = len(text) - len(after)
            return Reading(before, after, self._token_at(ids, end, closing), readable)
        asked = self.decode(prompt_ids)
        if opened or asked.rfind(opening) > asked.rfind(closing):
            return Reading(body, "", None, readable)
        return Reading("", text, None, readable)

    def _token_at(self, ids: Sequence[int], end_char: int, closing: str) -> int:
        """Index of the token with which the closing tag that ends at ``end_char`` is complete (by bisection)."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            text = self.decode(ids[:middle])
            if len(text) >= end_char and text[:end_char].endswith(closing):
                high = middle
            else:
                low = middle + 1
        return low - 1

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        written = bool(bos) and text.startswith(bos)  # the text brings its own: do not let the tokenizer add a second one
        return list(self.tokenizer(text, add_special_tokens=not written)["input_ids"])


def make_format(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> PromptFormat:
    """The format of a Hugging Face model as the experiment's ``model`` block asks.

    Raises:
        ModelError: ``prompt: chat`` and the tokenizer has no chat template, or none that takes a plain question.
        ConfigError: one thinking tag is given without the other.
    """
    template = tokenizer.chat_template
    if config.prompt == "chat" and not template:
        raise ModelError(
            f"model.prompt: 'chat', but the tokenizer of {config.name} has no chat template; use model.prompt=plain, "
            "or put a chat_template.jinja into the model's folder"
        )
    if isinstance(template, dict):
        names = ", ".join(template)
        raise ModelError(f"{config.name}: the tokenizer has several chat templates ({names}); keep one, or use model.prompt=plain")
    tags = _tags(config, tokenizer)
    built = PromptFormat(
        tokenizer,
        kind="chat" if template and config.prompt != "plain" else "pattern",
        suffix=config.prompt_suffix,
        tags=tags,
        end_ids=frozenset(eos_ids),
        hidden_ids=_hidden(tokenizer, tags),
    )
    probe = Problem(id="probe", question="1 + 1 =", answer="2", dataset="probe", revision="probe")
    try:
        ids = built.prompt_ids(probe)
    except Exception as error:  # a chat template is a program of the model's authors: anything can come
        reason = " ".join(str(error).split())
        raise ModelError(f"{config.name}: its chat template fails on a plain question ({reason}); use model.prompt=plain") from error
    if not ids:
        raise ModelError(
            f"{config.name}: the tokenizer makes no tokens of '{probe.question}'; are its files (tokenizer.json, ...) with the model?"
        )
    return built


def builtin_format(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> PromptFormat:
    """The built-in reasoner's format. Its self-report (``<sep>`` and what follows) may not be read: it would be a leak."""
    from tribunal.models import reasoner

    for name, default in (("prompt_suffix", ""), ("think_open", None), ("think_close", None)):
        if (value := getattr(config, name)) != default:
            raise ConfigError(f"model.{name}: {value!r} cannot be set for {config.name}, whose text format is fixed; leave it out")
    if config.prompt == "chat":
        raise ModelError(f"model.prompt: 'chat', but {config.name} has no chat template; leave model.prompt out")
    tags = (reasoner.THINK, reasoner.END_THINK)
    return PromptFormat(
        tokenizer,
        kind="pattern",
        pattern=reasoner.prompt("{question}"),
        tags=tags,
        end_ids=frozenset(_ids(tokenizer, (reasoner.EOS, reasoner.SEP))),
        hidden_ids=_hidden(tokenizer, tags),
    )


def _tags(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    if (config.think_open is None) != (config.think_close is None):
        missing = "think_close" if config.think_close is None else "think_open"
        raise ConfigError(f"model.{missing}: missing; give both thinking tags or neither")
    if config.think_open is not None and config.think_close is not None:
        if not config.think_open or not config.think_close:
            raise ConfigError("model.think_open, model.think_close: empty; leave both out for a model without thinking tags")
        return config.think_open, config.think_close
    vocabulary = tokenizer.get_vocab()
    template = str(tokenizer.chat_template or "")
    for opening, closing in KNOWN_TAGS:
        if (opening in vocabulary and closing in vocabulary) or opening in template or closing in template:
            return opening, closing
    return None


def _hidden(tokenizer: PreTrainedTokenizerBase, tags: tuple[str, str] | None) -> frozenset[int]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return frozenset(special - set(_ids(tokenizer, tags or ())))


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Ids of those of the tokens that are one token of this vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens if token in vocabulary]
