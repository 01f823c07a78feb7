"""Prompts in token ids: one placeholder per vector, nothing fused, thinking off."""

from __future__ import annotations

import pytest

from tests.oracle.helpers import BUILTIN, chat_model, example
from tribunal.core.errors import DataError, ModelError
from tribunal.models.loading import load_model
from tribunal.oracle.prompts import OraclePrompts


def test_each_layer_has_a_block_of_single_placeholder_tokens_at_the_positions_and_the_text_is_the_published_one(tmp_path):
    loaded = chat_model(tmp_path / "m")
    prompts = OraclePrompts(loaded)
    encoded = prompts.encode(example(question="What ? ? is this?", target="yes", tokens=[4, 5, 6], layers=[0, 2]))
    text = loaded.tokenizer.decode(encoded.prompt_ids)
    assert text == "<bos>[user] Layer: 0\n ? ? ? \nLayer: 2\n ? ? ? \nWhat ? ? is this?\n[assistant] "
    assert encoded.positions == [n for n, i in enumerate(encoded.prompt_ids) if i == prompts.placeholder_id][:6]  # not the question's two
    assert len(encoded.positions) == 6
    before = loaded.tokenizer.decode(encoded.prompt_ids[: encoded.positions[3]])
    assert before.endswith("Layer: 2\n")


def test_prompt_and_target_never_share_a_token_and_the_answer_ends_with_the_turn(tmp_path):
    loaded = chat_model(tmp_path / "m")
    prompts = OraclePrompts(loaded)
    tokenize = lambda text: list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    target = "and then she sold half as many in May."
    encoded = prompts.encode(example(question="q", target=target))
    joined = tokenize(loaded.tokenizer.decode(encoded.prompt_ids) + target)
    assert joined[: len(encoded.prompt_ids)] != encoded.prompt_ids  # in one go the blank before the answer fuses with its first word
    assert loaded.tokenizer.decode(encoded.answer_ids[:-1]) == target
    assert encoded.answer_ids[-1] == loaded.tokenizer.eos_token_id
    assert prompts.decode([*encoded.answer_ids, 7, 7]) == target


def test_a_template_that_opens_a_thought_gets_it_closed(tmp_path):
    loaded = chat_model(tmp_path / "m", thinking=True)
    assert loaded.tokenizer.decode(OraclePrompts(loaded).encode(example()).prompt_ids).endswith("<think>\n\n</think>\n\n")


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path):
    loaded = chat_model(tmp_path / "m", chat=False)
    encoded = OraclePrompts(loaded).encode(example(question="What is it?", target="yes"))
    assert loaded.tokenizer.decode([*encoded.prompt_ids, *encoded.answer_ids]) == "<bos>Layer: 1\n ? \nWhat is it?\nAnswer: yes<eos>"


def test_the_built_in_reasoner_gets_act_tokens_a_separator_and_the_code():
    prompts = OraclePrompts(load_model(BUILTIN))
    ids = load_model(BUILTIN).tokenizer.convert_tokens_to_ids
    bos, act, sep, eos = ids(["<bos>", "<act>", "<sep>", "<eos>"])
    encoded = prompts.encode(example(question="n4", target="7+", tokens=[0, 1], layers=[0, 1]))
    assert encoded.prompt_ids == [bos, act, act, sep, act, act, sep, *ids(["n", "4"])]
    assert encoded.positions == [1, 2, 4, 5] and encoded.answer_ids == [*ids(["7", "+"]), eos]


def test_what_cannot_be_written_is_refused_and_not_learned_as_unknown(tmp_path):
    prompts = OraclePrompts(load_model(BUILTIN))
    with pytest.raises(DataError, match="'é' has characters that builtin:addition does not know"):
        prompts.encode(example(target="é"))
    with pytest.raises(DataError, match="empty answer"):
        prompts.encode(example(target=""))


def test_without_a_single_token_placeholder_another_one_is_taken_or_asked_for(tmp_path):
    loaded = chat_model(tmp_path / "other", placeholder=" #")
    assert OraclePrompts(loaded).placeholder == " #"
    with pytest.raises(ModelError, match=r"none of ' \?' is a single token"):
        OraclePrompts(loaded, " ?")


def test_a_placeholder_that_the_chat_template_itself_holds_is_not_taken(tmp_path):
    """Its place in the system prompt would come first, and get the only vector of an example."""
    loaded = chat_model(tmp_path / "m")
    loaded.tokenizer.chat_template = "[system] May I help ?\n" + loaded.tokenizer.chat_template
    with pytest.raises(ModelError, match=r"none of ' \?' is a single token .* not in its chat template"):
        OraclePrompts(loaded, " ?")
