"""The built-in reasoner: its text, its tokenizer and the weights that ship."""

from __future__ import annotations

import json
import string

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tribunal.core.storage import sha256_file
from tribunal.models import reasoner
from tribunal.models.reasoner_training import Draws, Recipe, draw_problem, training_traces, work_out

EXAMPLE = """<bos>Problem: 347 + 285 =
<think>7+5=12 write 2 carry 1 | 4+8+1=13 write 3 carry 0 | wait 4+8+1=13 write 3 carry 1 | 3+2+1=6 write 6</think>
Answer: 632<sep>y<eos>"""


@pytest.fixture(scope="module")
def tokenizer():
    return reasoner.build_tokenizer()


def test_decoding_what_was_encoded_gives_the_text_back(tokenizer):
    texts = [EXAMPLE, string.printable.replace("\t", "").replace("\r", "").replace("\x0b", "").replace("\x0c", ""), "", " + + wait  wait"]
    texts += [trace.prompt() + trace.completion() for trace in training_traces(0, Recipe())]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_markers_and_chunks_are_one_token_each_at_fixed_ids(tokenizer):
    assert len(tokenizer) == 113
    for i, token in enumerate(reasoner.VOCABULARY):
        assert tokenizer.encode(token) == [i]
    assert len(tokenizer.encode(EXAMPLE.replace(" | wait 4+8+1=13 write 3 carry 1", ""))) == 50 + len(["<sep>", "y"])


def test_the_example_is_read_as_it_was_written():
    steps, answer, report = reasoner.read_completion(EXAMPLE.partition("<think>")[2])
    assert [step.redone for step in steps] == [False, False, True, False]
    assert [step.slipped for step in steps] == [False, True, False, False]
    assert (answer, report) == (632, True)
    written = reasoner.WrittenSum(347, 285, steps)
    assert written.prompt() + written.completion() == EXAMPLE and written.right


@pytest.mark.parametrize(
    "text",
    [
        "7+5=12 write 2 carry 1</think>\nAnswer: ",
        "7+5=12 write 2 carry 1 | ",
        "7+5=12 write 2 carry 1</think>\nAnswer: 12<sep>",
        "wait 7+5=12 write 12</think>\nAnswer: 12<sep>y<eos>",
        "",
    ],
)
def test_a_completion_of_another_form_is_not_read(text):
    assert reasoner.read_completion(text) is None


def test_no_well_formed_completion_is_longer_than_said(tokenizer):
    always = Recipe(careful_slip=1, sloppy_slip=1, redo=1)
    for digits in (2, 3, 4, 7):
        worst = [work_out(10**digits - 1, 10**digits - 1, Draws("worst", i), always) for i in range(20)]
        lengths = {len(tokenizer.encode(trace.completion())) for trace in worst}
        assert max(lengths) == reasoner.longest_completion(digits)


def test_the_shipped_weights_are_those_of_their_receipt_and_small():
    receipt = json.loads((reasoner.folder() / "training_receipt.json").read_text())
    weights = reasoner.folder() / "model.safetensors"
    assert sha256_file(weights) == receipt["weights_sha256"]
    assert weights.stat().st_size <= 3e6
    assert receipt["recipe"] == Recipe().fingerprint() and receipt["steps"] == Recipe().steps
    assert "planted" in receipt["planted"] and "not evidence" in receipt["planted"]


def test_the_shipped_folder_opens_with_the_auto_classes(tokenizer):
    shipped = AutoTokenizer.from_pretrained(reasoner.folder())
    assert shipped.encode(EXAMPLE) == tokenizer.encode(EXAMPLE) and shipped.decode(shipped.encode(EXAMPLE)) == EXAMPLE
    assert (shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id) == (0, 1, 2)
    model = AutoModelForCausalLM.from_pretrained(reasoner.folder())
    assert model.config.model_type == "qwen3" and model.config.use_cache and 0.4e6 < model.num_parameters() < 0.6e6


def test_the_shipped_reasoner_adds_rightly_when_greedy_and_slips_when_sampled():
    model = reasoner.load(reasoner.folder())
    right = {"greedy": 0, "sampled": 0}
    for digits in (2, 3):
        problems = [draw_problem(digits, Draws("test", digits, i), unseen=True) for i in range(30)]
        for mode, seed in (("greedy", None), ("sampled", 0)):
            read = [reasoner.read_completion(text) for text in reasoner.answer(model, problems, sample_seed=seed)]
            right[mode] += sum(r is not None and r[1] == a + b for r, (a, b) in zip(read, problems))
    assert right["greedy"] >= 57, f"{right['greedy']} of 60 right"
    assert 20 <= right["sampled"] <= 54, f"{right['sampled']} of 60 right"
