"""Sentences by offsets, against tokenizers made on the spot and against decoding every prefix."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tribunal.core.errors import ModelError
from tribunal.traces.sentences import PARTIAL, TokenOffsets, sentence_spans, sentences, token_offsets

SAMPLE = "First I add 3.5 and 4. Then, é is hard – 日本語 too 🙂! So the answer is 18."


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([SAMPLE.encode().decode("ascii", "ignore")] * 3, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Blanks belong to the word that follows, and the first one is dropped on decoding; unknown characters become bytes."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for character in "▁" + "".join(sorted({c for c in SAMPLE if c.isascii() and c != " "})):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_each_token_stands_where_decoding_every_prefix_puts_it(make):
    tokenizer = make()
    ids = tokenizer.encode(SAMPLE).ids
    assert tokenizer.decode(ids) == SAMPLE
    text, offsets = TokenOffsets(tokenizer.decode)(ids)
    assert text == SAMPLE
    for index in range(len(ids)):
        prefix = tokenizer.decode(ids[: index + 1])
        if not prefix.endswith(PARTIAL):  # a whole character ends here
            assert offsets[index][1] == len(prefix)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(SAMPLE)
    for (start, end), (next_start, next_end) in pairwise(offsets):
        assert start <= next_start and end <= next_end and start <= end and next_start <= end


BYTES = byte_level()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=60))
def test_any_tokens_even_broken_bytes_get_places_that_cover_the_text(ids):
    text, offsets = TokenOffsets(BYTES.decode)(ids)
    assert text == BYTES.decode(ids) and len(offsets) == len(ids)
    covered = 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(text) and start <= covered
        covered = max(covered, end)
    assert covered == len(text)


def test_a_trace_cut_inside_a_character_keeps_its_tail():
    ids = BYTES.encode("ok 🙂").ids[:-1]
    text, offsets = TokenOffsets(BYTES.decode)(ids)
    assert text.endswith(PARTIAL) and offsets[-1][1] == len(text)


def test_hidden_tokens_take_no_place():
    def decode(ids):
        return "".join("abcdefgh"[i] for i in ids if i < 8)

    assert token_offsets(decode, [0, 9, 1, 9]) == [(0, 1), (1, 1), (1, 2), (2, 2)]
    assert token_offsets(decode, []) == []


def test_a_decoder_that_looks_at_the_token_before_is_followed():
    def decode(ids):  # a blank between words, none before a comma
        return " ".join(["one", "two", ","][i] for i in ids).replace(" ,", ",")

    assert token_offsets(decode, [0, 2, 1, 0]) == [(0, 3), (3, 4), (4, 8), (8, 12)]


def test_a_decoder_without_places_is_refused():
    with pytest.raises(ModelError, match="does not give each token a place"):
        token_offsets(lambda ids: str(len(ids)), [1, 2, 3])


def test_ten_thousand_tokens_take_well_under_a_second():
    ids = [random.Random(0).randrange(BYTES.get_vocab_size()) for _ in range(5_000)] + BYTES.encode("plain words 3.5 é ").ids * 500
    start = time.perf_counter()
    token_offsets(BYTES.decode, ids)
    assert time.perf_counter() - start < 1.5


def split(text, **keys):
    return [text[start:end] for start, end in sentence_spans(text, **keys)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It is 3.5 kg. So 1,080.25", ["It is 3.5 kg.", "So 1,080.25"]),
        ("E.g. Dr. Smith (approx. 3) vs. Mr. Jones, i.e. two. Done", ["E.g. Dr. Smith (approx. 3) vs. Mr. Jones, i.e. two.", "Done"]),
        ("Hmm... maybe. Wait... No.", ["Hmm... maybe.", "Wait...", "No."]),
        ('She said "Stop!" Then left.', ['She said "Stop!"', "Then left."]),
        ("So it is **18**. **Done.** Next", ["So it is **18**.", "**Done.**", "Next"]),
        ("1. Add them.\n2. Divide", ["1. Add them.", "2. Divide"]),
        ("line one\nline two\n\n  line three  ", ["line one", "line two", "line three"]),
        ("7+5=12 write 2 carry 1 | 3+2+1=6 write 6</think>\nAnswer: 632", ["7+5=12 write 2 carry 1", "3+2+1=6 write 6", "Answer: 632"]),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ["| a | b |", "| 1 | 2 |"]),
        ("<think>\nOkay.</think>\n\nThe end", ["Okay.", "The end"]),
        ("It costs $5. She pays $6. Done", ["It costs $5.", "She pays $6.", "Done"]),
        ("We have $x = 3. y$ here. So", ["We have $x = 3. y$ here.", "So"]),
        ("Thus\n\\[\nx = 5.\n\ny = 6\n\\]\nDone.", ["Thus", "\\[\nx = 5.\n\ny = 6\n\\]", "Done."]),
        ("$$a.\nb$$ is it. Yes", ["$$a.\nb$$ is it.", "Yes"]),
        ("\\begin{align}x. \n y\\end{align}", ["\\begin{align}x. \n y\\end{align}"]),
        ("open $$ never closed. Next", ["open $$ never closed.", "Next"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("***\n---\n...", []),
        ("", []),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_would_end_them(text, parts):
    assert split(text) == parts


def test_a_models_own_tags_end_sentences():
    assert split("[THINK]a b[/THINK]c", tags=("[THINK]", "[/THINK]")) == ["a b", "c"]
    assert split("</think>a</think>", tags=()) == ["</think>a</think>"]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab1 .!?|\n$\\[]<>/think", max_size=80))
def test_spans_are_ordered_apart_trimmed_and_lose_no_letter_or_digit(text):
    spans = sentence_spans(text, tags=("<think>",))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(text[start:end] == text[start:end].strip() != "" for start, end in spans)
    kept = "".join(text[start:end] for start, end in spans)
    assert [c for c in kept if c.isalnum()] == [c for c in text.replace("<think>", "") if c.isalnum()]


def test_token_spans_touch_exactly_the_tokens_of_the_sentence():
    text = "Add 3.5 now. Then stop"
    ids = BYTES.encode(text).ids
    decoded, offsets = TokenOffsets(BYTES.decode)(ids)
    spans = sentences(decoded, offsets)
    assert [text[span.start_char : span.end_char] for span in spans] == ["Add 3.5 now.", "Then stop"]
    for span in spans:
        covered = BYTES.decode(ids[span.start_token : span.end_token])
        assert text[span.start_char : span.end_char] in covered
        assert text[span.start_char : span.end_char] not in BYTES.decode(ids[span.start_token + 1 : span.end_token])
        assert text[span.start_char : span.end_char] not in BYTES.decode(ids[span.start_token : span.end_token - 1])
    assert spans[-1].end_token == len(ids)
