"""Answers with vectors injected: those of a plain loop over single prompts, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch

from tests.oracle.helpers import BUILTIN, chat_model, example
from tribunal.core.errors import ModelError
from tribunal.models.adapters import detach, new_adapter
from tribunal.models.loading import load_model
from tribunal.models.lora import LoraSettings
from tribunal.models.oracle_batches import Injection
from tribunal.models.residual import residual_hooks
from tribunal.oracle.answering import Answerer, Asked
from tribunal.oracle.prompts import OraclePrompts

INJECTION = Injection(layer=1, scale=1.5)


@pytest.fixture
def loaded():
    """The built-in model with a drawn adapter, so that answers depend on what is injected."""
    found = load_model(BUILTIN)
    peft = new_adapter(found, LoraSettings(rank=4, alpha=16, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    peft.eval()
    yield found
    detach(found.model)


def questions(count: int = 9) -> list[Asked]:
    """Different numbers of vectors, every fourth with nothing to put in."""
    draw = torch.Generator().manual_seed(2)
    asked = []
    for number in range(count):
        vectors = 1 + number % 5
        item = example(key=f"carry/p/0/{number}", question="cird"[number % 4], tokens=list(range(vectors)))
        asked.append(Asked(item, torch.randn(vectors, 128, generator=draw) if number % 4 else None))
    return asked


def plain(loaded, prompts, asked: Asked, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits after the prompt: one row, no cache, the vectors put in by a Python loop at every pass."""
    encoded = prompts.encode(asked.example)

    def edit(hidden):
        new = hidden.clone()
        for position, vector in zip(encoded.positions, asked.vectors_KD if asked.vectors_KD is not None else ()):
            new[0, position] += 1.5 * hidden[0, position].norm() * vector / vector.norm()
        return new

    ids, first = list(encoded.prompt_ids), None
    with torch.no_grad(), residual_hooks(loaded.model, {1: edit}):
        for _ in range(steps):
            logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            first = logits if first is None else first
            ids.append(int(logits.argmax()))
            if ids[-1] == prompts.eos_id:
                break
    return ids[len(encoded.prompt_ids) :], first


def test_answers_are_those_of_single_prompts_with_vectors_put_in_by_hand(loaded):
    prompts, asked = OraclePrompts(loaded), questions()
    answerer = Answerer(loaded, prompts, INJECTION, slots=4, max_new_tokens=6)
    expected = [prompts.decode(plain(loaded, prompts, one, 6)[0]) for one in asked]
    assert answerer.answers(asked) == expected and len(set(expected)) > 3


def test_with_nothing_injected_the_state_at_the_placeholders_stays_as_it_is_in_both_modes(loaded):
    prompts, asked = OraclePrompts(loaded), [question for question in questions() if question.vectors_KD is not None]
    nothing = [Asked(question.example, None) for question in asked]
    expected = [float(row[1] - row[0]) for row in (plain(loaded, prompts, one, 1)[1][prompts.target_ids("01")] for one in nothing)]
    for mode in ("add", "replace"):
        answerer = Answerer(loaded, prompts, INJECTION._replace(mode=mode), slots=4, max_new_tokens=6)
        assert answerer.log_odds(nothing, ("0", "1")) == pytest.approx(expected, abs=1e-4)
        assert answerer.log_odds(asked, ("0", "1")) != pytest.approx(expected, abs=1e-2)


def test_log_odds_and_losses_are_those_of_single_prompts(loaded):
    prompts, asked = OraclePrompts(loaded), questions()
    answerer = Answerer(loaded, prompts, INJECTION, slots=4, max_new_tokens=6, batch_tokens=30)
    zero, one = (prompts.target_ids(text)[0] for text in ("0", "1"))
    logits = [plain(loaded, prompts, question, 1)[1].log_softmax(-1) for question in asked]
    odds = answerer.log_odds(asked, ("0", "1"))
    assert odds == pytest.approx([float(row[one] - row[zero]) for row in logits], abs=1e-4)
    for (loss, tokens), question, row in zip(answerer.losses(asked), asked, logits):
        assert tokens == 2 and loss > -float(row[prompts.target_ids(question.example.target)[0]]) - 1e-4
    short = [Asked(q.example, q.vectors_KD) for q in asked]
    prompts.answer_ids = lambda item: prompts.target_ids(item.target)  # without the end of the turn: the first token's loss alone
    assert [loss for loss, _ in answerer.losses(short)] == pytest.approx([-float(row[one]) for row in logits], abs=1e-4)


def test_a_layer_that_is_not_there_and_choices_that_begin_alike_are_refused(loaded):
    prompts = OraclePrompts(loaded)
    with pytest.raises(ModelError, match=r"injection\.layer: no layer 3; builtin:addition has 3, 0 to 2"):
        Answerer(loaded, prompts, Injection(layer=3), slots=4, max_new_tokens=4)
    with pytest.raises(ModelError, match="begin with the same token"):
        Answerer(loaded, prompts, INJECTION, slots=4, max_new_tokens=4).log_odds(questions(), ("10", "11"))


def test_yes_and_no_are_weighed_in_every_spelling_since_published_oracles_say_them_with_a_capital(tmp_path):
    """The head says "Yes" or "No" by turns, and "yes" and "no" the other way round, far below; "YES" and "NO" begin with one token."""
    loaded = chat_model(tmp_path / "m")
    prompts = OraclePrompts(loaded)
    says = {"Yes": [3.0, -3.0], "No": [-3.0, 3.0], "yes": [-9.0, -8.0], "no": [-8.0, -9.0]}
    ids = dict(zip([*says, "YES", "NO"], [90, 91, 92, 93, 94, 94]))
    prompts._ids = lambda text: [ids[text]] if text in ids else OraclePrompts._ids(prompts, text)

    def head(module, inputs, logits):
        made = torch.full_like(logits, -20.0)
        made[..., 94] = 50.0
        for word, values in says.items():
            made[..., ids[word]] = torch.tensor(values)[:, None]
        return made

    answerer = Answerer(loaded, prompts, INJECTION, slots=2, max_new_tokens=4)
    asked = [Asked(example("correctness", key=f"k{n}", question="Is it?", target="yes"), None) for n in range(2)]
    handle = loaded.model.get_output_embeddings().register_forward_hook(head)
    try:
        found = answerer.log_odds(asked, ("no", "yes"))
    finally:
        handle.remove()
    assert found == pytest.approx([6.0, -6.0], abs=0.02)
