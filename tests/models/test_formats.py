from __future__ import annotations

import pytest

from tests.tiny_models import tiny_tokenizer
from tribunal.core.config import ModelConfig
from tribunal.core.errors import ConfigError, ModelError
from tribunal.core.records import Problem
from tribunal.models.formats import builtin_format, make_format
from tribunal.models.reasoner import build_tokenizer

EOS = (2,)


def problem(question: str = "What is 12 times 7?", **extra) -> Problem:
    return Problem(id="p", question=question, answer="84", dataset="d", revision="r", **extra)


def made(tokenizer=None, eos=EOS, **config):
    return make_format(ModelConfig(name="m", **config), tokenizer or tiny_tokenizer(), eos)


def completion(fmt, text: str) -> list[int]:
    return fmt.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_has_exactly_one_beginning_of_sequence(chat):
    fmt = made(tiny_tokenizer(chat=chat))
    ids = fmt.prompt_ids(problem())
    assert ids.count(1) == 1 and ids[0] == 1
    expected = "[user] What is 12 times 7?\n[assistant] " if chat else "What is 12 times 7?"
    assert fmt.decode(ids) == expected


def test_prompt_plain_leaves_the_chat_template_out():
    fmt = made(tiny_tokenizer(chat=True), prompt="plain")
    assert fmt.decode(fmt.prompt_ids(problem())) == "What is 12 times 7?"


def test_the_suffix_stands_on_a_line_of_its_own_after_the_question():
    fmt = made(prompt_suffix="Answer with a number.")
    assert fmt.decode(fmt.prompt_ids(problem())) == "What is 12 times 7?\nAnswer with a number."
    assert fmt.template_sha256 != made().template_sha256


def test_a_continuation_is_the_plain_prefix():
    fmt = made(tiny_tokenizer(chat=True), prompt_suffix="Answer with a number.")
    assert fmt.decode(fmt.prompt_ids(problem("Natalia sold clips to", kind="continuation"))) == "Natalia sold clips to"


def test_prompt_chat_without_a_template_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"no chat template; use model\.prompt=plain") as caught:
        made(prompt="chat")
    assert "\n" not in str(caught.value)


def test_a_template_that_fails_is_refused_in_one_line():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a system prompt\nis needed') }}"
    with pytest.raises(ModelError, match="a system prompt is needed"):
        made(tokenizer)


def test_a_model_without_thinking_tags_has_no_thought():
    fmt = made()
    ids = [*completion(fmt, "The answer is 84. </think>"), 2]
    assert fmt.read(ids) == ("", "The answer is 84. </think>", None, len(ids) - 1)


@pytest.mark.parametrize("text", ["<think>12 times 7</think>\n84", "12 times 7</think>\n84", "\n<think>12 times 7</think>\n84"])
def test_thought_and_response_are_split_at_the_closing_tag(text):
    fmt = made(tiny_tokenizer(thinking=True))
    ids = completion(fmt, text)
    assert len(completion(fmt, "</think>")) > 1  # several tokens in this vocabulary
    reading = fmt.read([*ids, 2])
    assert (reading.thought, reading.response, reading.readable) == ("12 times 7", "\n84", len(ids))
    end = reading.thought_end
    assert "</think>" in fmt.decode(ids[: end + 1]) and "</think>" not in fmt.decode(ids[:end])


def test_the_last_closing_tag_counts():
    fmt = made(tiny_tokenizer(thinking=True))
    ids = completion(fmt, "one</think>two</think>three")
    reading = fmt.read(ids)
    assert (reading.thought, reading.response) == ("one</think>two", "three")
    assert fmt.decode(ids[: reading.thought_end + 1]).count("</think>") == 2
    assert fmt.decode(ids[: reading.thought_end]).count("</think>") == 1


def test_the_end_of_the_thought_is_found_behind_characters_of_several_tokens():
    fmt = made(tiny_tokenizer(thinking=True))
    for before in ("", "é", "漢字 🙂🙂", "🙂" * 5):
        for after in ("", "漢", "🙂 84"):
            ids = completion(fmt, f"{before}</think>{after}")
            slow = next(n for n in range(len(ids)) if "</think>" in fmt.decode(ids[: n + 1]))
            assert fmt.read(ids) == (before, after, slow, len(ids))


def test_a_tag_that_is_one_token_is_found_too():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)  # some models mark them special: still text
    fmt = made(tokenizer)
    ids = completion(fmt, "<think>12 times 7</think>84")
    reading = fmt.read(ids)
    assert (reading.thought, reading.response) == ("12 times 7", "84")
    assert tokenizer.convert_ids_to_tokens(ids[reading.thought_end]) == "</think>"


def test_a_thought_that_never_closes_has_no_response():
    fmt = made(tiny_tokenizer(thinking=True))
    ids = completion(fmt, "12 times 7 is")
    assert fmt.read(ids, fmt.prompt_ids(problem())) == ("12 times 7 is", "", None, len(ids))  # the prompt opened it
    opened = completion(fmt, "<think>12 times 7 is")
    assert fmt.read(opened) == ("12 times 7 is", "", None, len(opened))


def test_a_thinking_model_may_answer_without_a_thought():
    fmt = made(tiny_tokenizer(thinking=True))
    for prompt in ("What?", "What? <think>\n\n</think>\n\n"):
        assert fmt.read(completion(fmt, "It is 84"), completion(fmt, prompt)) == ("", "It is 84", None, len(completion(fmt, "It is 84")))


def test_tags_can_be_given():
    fmt = made(think_open="[[", think_close="]]")
    assert fmt.read(completion(fmt, "[[12]]84"))[:2] == ("12", "84")
    with pytest.raises(ConfigError, match=r"model\.think_close: missing"):
        made(think_open="[[")


def test_text_and_readable_stop_before_the_end_of_sequence():
    fmt = made(eos=(2, 3))
    ids = completion(fmt, "84")
    assert fmt.read([*ids, 3]) == ("", "84", None, len(ids))
    assert fmt.decode([1, *ids, 2]) == "84"


@pytest.fixture(scope="module")
def builtin():
    return builtin_format(build_tokenizer(), ModelConfig(name="builtin:addition"))


def test_the_builtin_prompt_opens_the_thought(builtin):
    ids = builtin.prompt_ids(problem("347 + 285 ="))
    assert ids == builtin.tokenizer("<bos>Problem: 347 + 285 =\n<think>")["input_ids"]
    assert ids.count(1) == 1


def test_the_builtin_self_report_is_not_readable(builtin):
    trace = "7+5=12 write 2 carry 1 | 3+2+1=6 write 6</think>\nAnswer: 62"
    text, ids = completion(builtin, trace), completion(builtin, trace + "<sep>y<eos>")
    reading = builtin.read(ids, builtin.prompt_ids(problem("37 + 25 =")))
    assert reading.readable == len(text)
    assert reading.thought == "7+5=12 write 2 carry 1 | 3+2+1=6 write 6" and reading.response == "\nAnswer: 62"
    assert builtin.tokenizer.convert_ids_to_tokens(ids[reading.thought_end]) == "</think>"
    assert builtin.decode(ids[: reading.readable]) == trace


def test_the_builtin_format_is_fixed():
    with pytest.raises(ConfigError, match=r"model\.prompt_suffix"):
        builtin_format(build_tokenizer(), ModelConfig(name="builtin:addition", prompt_suffix="x"))
