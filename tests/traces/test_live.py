"""Text and sentences of a growing completion, against those of the whole one."""

from __future__ import annotations

import random

import pytest

from tests.tiny_models import SENTENCES, tiny_tokenizer
from tribunal.traces.live import LiveText
from tribunal.traces.sentences import sentences, token_offsets

PIECES = [
    *SENTENCES, "<think>\n", "</think>", "\n\n", " | ", "So x = 3.14, e.g. pi.", "3. Then add.", "Café costs 5 €!", "…", "\n| a | b |\n",
    "is $x. y$ odd?", "日本。次の文", "🙂🙂 done",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "wordlevel"])
def test_sentences_told_one_by_one_are_those_of_the_whole_text(kind):
    tokenizer = tiny_tokenizer(kind)

    def decode(ids):
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    late = []
    for seed in range(60):
        draw = random.Random(seed)
        ids = tokenizer(draw.choice(" \n").join(draw.choices(PIECES, k=draw.randint(1, 12))), add_special_tokens=False)["input_ids"]
        live, text, told = LiveText(decode, ("<think>", "</think>")), "", []
        for number, token in enumerate(ids):
            piece, ended = live.add(token)
            text += piece
            told += ended
            late += [number - span.end_token for span in ended]
        piece, ended = live.finish()
        assert text + piece == decode(ids)
        assert told + ended == sentences(decode(ids), token_offsets(decode, ids))
    assert len(late) > 60 and sorted(late)[len(late) // 2] <= 4  # most are told while the next one begins, not at the end
