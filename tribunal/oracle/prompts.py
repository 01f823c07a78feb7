"""The oracle's prompt: one placeholder token for each injected vector, the question, and the answer's tokens apart.

Chat models get one user turn with thinking disabled::

    Layer: 18
     ? ? ? \n
    <question>

with one such block for each layer, as the released Activation Oracles were trained. Prompt and answer are tokenised apart, so
that no token reaches over their border and the answer's first token is learned like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tribunal.core.errors import DataError, ModelError
from tribunal.models import reasoner
from tribunal.models.loading import LoadedModel
from tribunal.models.oracle_batches import Lesson
from tribunal.oracle.examples import Example

PLACEHOLDERS = (" ?", " @", " #", " *", " &", " _")
"""The first that is a single token of the vocabulary is used; released oracles use the first."""


class OraclePrompts:
    """Encodes examples for one model.

    Args:
        loaded: a chat model, a plain one, or the built-in reasoner.
        placeholder: the text of the placeholder token, with its blank; default: see ``PLACEHOLDERS``.
    Raises:
        ModelError: no placeholder is a single token, or there is no end-of-sequence token.
    """

    def __init__(self, loaded: LoadedModel, placeholder: str | None = None) -> None:
        self.name = loaded.name
        self.format = loaded.format
        self.tokenizer: Any = loaded.tokenizer
        self.builtin = is_builtin(loaded)
        self.placeholder = reasoner.ACT if self.builtin else self._single_token(placeholder)
        self.placeholder_id: int = self._ids(self.placeholder)[0]
        eos = self.tokenizer.eos_token_id  # of a chat model: the end of a turn, where the generation config may list others first
        if eos is None and not loaded.eos_ids:
            raise ModelError(f"{self.name}: neither the tokenizer nor the generation config names an end-of-sequence token")
        self.eos_id: int = loaded.eos_ids[0] if eos is None else eos

    def encode(self, example: Example, *, inject: bool = True) -> Lesson:
        """The example in token ids, ready to be asked or learned.

        Args:
            inject: False leaves the placeholders where they are and lists none of them, so that nothing is put in: all that
                the prompt gives away, the number of vectors included, and no activation.

        Raises:
            DataError: the question or answer cannot be written in the model's vocabulary.
            ModelError: the tokenizer merges placeholders with their neighbours.
        """
        counts = [len(example.tokens)] * len(example.layers)
        if self.builtin:
            bos, sep, act = (self._ids(token)[0] for token in (reasoner.BOS, reasoner.SEP, reasoner.ACT))
            head = [bos, *(token for count in counts for token in [*[act] * count, sep])]
            prompt_ids = head + self._known(example, example.question)
        else:
            blocks = "".join(f"Layer: {layer}\n{self.placeholder * count} \n" for layer, count in zip(example.layers, counts))
            prompt_ids = self._prompt(blocks + example.question)
        positions = self._positions(prompt_ids, counts, example)
        return Lesson(prompt_ids, positions if inject else [], self.answer_ids(example))

    def answer_ids(self, example: Example) -> list[int]:
        """The target's tokens and the end of the turn."""
        return [*self.target_ids(example.target, example), self.eos_id]

    def target_ids(self, target: str, example: Example | None = None) -> list[int]:
        """An answer's tokens without the end.

        Raises:
            DataError: there are none, or the vocabulary cannot write it.
        """
        ids = self._known(example, target) if self.builtin else self._ids(target if self.format.kind == "chat" else f" {target}")
        if not ids:
            raise DataError(f"example {example.key if example else '?'}: an empty answer cannot be learned; run the label audit")
        return ids

    def beginnings(self, choice: str) -> list[int]:
        """The tokens with which an answer may begin that is this choice but for its case: others' oracles say "Yes"."""
        blank = "" if self.builtin or self.format.kind == "chat" else " "
        others = [self._ids(blank + spelling) for spelling in (choice.capitalize(), choice.upper())]
        known = [ids[0] for ids in others if ids and self.tokenizer.unk_token_id not in ids]
        return list(dict.fromkeys([self.target_ids(choice)[0], *known]))

    def decode(self, ids: Sequence[int]) -> str:
        """A generated answer as text: up to the end of the turn, blanks at its ends left out."""
        end = next((n for n, token in enumerate(ids) if token == self.eos_id), len(ids))
        return self.format.decode(list(ids[:end])).strip()

    def _prompt(self, content: str) -> list[int]:
        """Token ids of one user turn up to where the answer begins."""
        if self.format.kind != "chat":
            bos = self.tokenizer.bos_token_id
            return [*([bos] if bos is not None else []), *self._ids(f"{content}\nAnswer:")]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        if self.format.tags is not None:
            opening, closing = self.format.tags
            if text.rfind(opening) > text.rfind(closing):  # a template that always opens a thought: close it
                text = f"{text.rstrip()}\n\n{closing}\n\n"
        return self._ids(text)  # the text brings its own beginning-of-sequence token where the template has one

    def _positions(self, prompt_ids: Sequence[int], counts: Sequence[int], example: Example) -> list[int]:
        """Where the placeholders stand: the first runs of them, as long as asked, none longer."""
        places = [n for n, token in enumerate(prompt_ids) if token == self.placeholder_id]
        runs: list[list[int]] = []
        for place in places:
            if runs and place == runs[-1][-1] + 1:
                runs[-1].append(place)
            else:
                runs.append([place])
        found = runs[: len(counts)]
        if [len(run) for run in found] != list(counts):
            raise ModelError(
                f"{self.name}: example {example.key} needs runs of {list(counts)} placeholder tokens {self.placeholder!r}, the tokenizer "
                f"made {[len(run) for run in found]}; set another placeholder"
            )
        return [place for run in found for place in run]

    def _single_token(self, placeholder: str | None) -> str:
        around = self._prompt("0")  # a system prompt that holds the placeholder would get the vectors
        for candidate in (placeholder,) if placeholder else PLACEHOLDERS:
            one, two = self._ids(f"0\n{candidate} \n"), self._ids(f"0\n{candidate}{candidate} \n")
            ids = self._ids(candidate)
            if len(ids) == 1 and one.count(ids[0]) == 1 and two.count(ids[0]) == 2 and ids[0] not in around:
                return candidate
        listed = ", ".join(map(repr, (placeholder,) if placeholder else PLACEHOLDERS))
        raise ModelError(
            f"{self.name}: none of {listed} is a single token of its vocabulary that stays apart, and not in its chat template; "
            "set another placeholder"
        )

    def _known(self, example: Example | None, text: str) -> list[int]:
        ids = self._ids(text)
        if self.tokenizer.unk_token_id in ids:
            raise DataError(
                f"example {example.key if example else '?'}: {text!r} has characters that {self.name} does not know (it knows ASCII)"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def is_builtin(loaded: LoadedModel) -> bool:
    """Whether questions must be put as codes in the built-in reasoner's own vocabulary."""
    return loaded.name.startswith("builtin:")
