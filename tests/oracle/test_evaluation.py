"""What an oracle and its controls are asked: the same prompt, and activations of the right problem, of another one, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracle.helpers import BUILTIN, example
from tribunal.core.errors import DataError
from tribunal.models.adapters import detach, new_adapter
from tribunal.models.loading import load_model
from tribunal.models.lora import LoraSettings
from tribunal.oracle.evaluation import BEST, CONDITIONS, OracleEvaluation, Who
from tribunal.oracle.examples import Example
from tribunal.oracle.prompts import OraclePrompts
from tribunal.oracle.settings import OracleFacts
from tribunal.oracle.training import ExampleLessons, spread

CHOICES = ["0", "1"]


class Numbered:
    """Vectors that say whose they are."""

    def of(self, item: Example) -> torch.Tensor:
        return torch.full((item.n_vectors, 128), float(item.key.rpartition("/")[2]))


def items(groups: int = 6) -> list[Example]:
    """Held-out items, two problems of each group, with different numbers of tokens."""
    return [
        example(key=f"carry/p{n}/0/{n}", problem_id=f"p{n}", group=f"g{n // 2}", tokens=[*range(1 + n % 3)], split="test", choices=CHOICES)
        for n in range(2 * groups)
    ]


def evaluation(examples: list[Example], published: Sequence[str] = ()) -> OracleEvaluation:
    loaded = load_model(BUILTIN)
    known: dict[str, Any] = {
        "model": {}, "dtype": "float32", "seed": 0, "tasks": ["carry"], "examples": {}, "injection": {"mode": "replace"}, "planted": True,
        "placeholder": "<act>", "max_new_tokens": 4, "slots": 4, "steps": 9, "best_step": 9, "kept": [4, 9],
        "text_only_steps": 9, "start_from": None,
        "counts": {}, "validation": None, "examples_sha256": "",
    }  # fmt: skip
    corpus: Any = SimpleNamespace(examples=examples, of_split=lambda split: [e for e in examples if e.split == split])
    source: Any = None
    given: dict[str, Any] = {"items_per_task": 400, "chunk": 200, "traces_per_file": 9, "seed": 0}
    return OracleEvaluation(loaded, OracleFacts(**known), Path(), corpus, source, steps=[4], published=published, **given)


@pytest.mark.parametrize("condition", ["zeroed", "text_only"])
def test_the_controls_without_activations_see_all_of_the_oracles_prompt_and_nothing_is_injected(condition):
    asked, vectors, prompts = items(), Numbered(), OraclePrompts(load_model(BUILTIN))
    learned, control = ExampleLessons(asked, prompts, vectors), ExampleLessons(asked, prompts, None)
    made = evaluation(asked)
    for item, lesson, theirs in zip(asked, learned.lessons, control.lessons, strict=True):
        assert len(lesson.positions) == item.n_vectors and theirs == lesson._replace(positions=[])
        question = made._asked(item, condition, vectors)
        assert question.example == item and question.vectors_KD is None


def test_shuffled_activations_are_never_of_the_same_problem_with_another_hint():
    made = evaluation(items())
    partners = {item.key: made.partner(item) for item in made.items["carry"]}
    assert all(partner.group != item.group for item, partner in zip(made.items["carry"], partners.values()))
    assert len({partner.key for partner in partners.values()}) > 3


@pytest.mark.parametrize(("count", "found"), [(0, "0 held-out items of 0 problems"), (1, "2 held-out items of 1 problem;")])
def test_a_task_without_held_out_items_of_two_problems_is_refused_before_anything_is_asked(count, found):
    with pytest.raises(DataError, match=f"^evaluate_oracle: task carry has {found}.*raise examples.test_share") as caught:
        evaluation(items(count))
    assert "\n" not in str(caught.value)


def test_every_adapter_is_asked_with_its_own_with_anothers_and_without_activations(tmp_path):
    loaded = load_model(BUILTIN)
    new_adapter(loaded, LoraSettings(rank=2), seed=0).save_pretrained(str(tmp_path), save_embedding_layers=False)
    detach(loaded.model)
    asked: dict[Who, list[str]] = {}
    for unit in evaluation(items(), [str(tmp_path)]).plan():
        asked.setdefault(unit.who, []).append(unit.condition)
    others = {Who(step=4): list(CONDITIONS), Who(adapter=str(tmp_path)): list(CONDITIONS)}
    assert asked == {BEST: ["linear_probe", *CONDITIONS, "text_only"], **others}


def test_the_majoritys_log_odds_are_the_shares_of_the_training_targets():
    learned = [example(key=f"carry/t/0/{n}", target="1" if n < 29 else "0", choices=CHOICES) for n in range(38)]
    answer = evaluation([*items(), *learned]).majority("carry")
    assert answer.text == "1" and answer.odds == pytest.approx(math.log(30 / 10))


@pytest.mark.parametrize("traces", [50, 51, 100])
def test_the_items_that_are_asked_are_of_all_places_in_their_traces(traces):
    """Six questions a trace, fifty items in all: every sixth would be the first sentence of each trace."""
    every = [example(key=f"carry/p{n}/0/{place}", problem_id=f"p{n}") for n in range(traces) for place in range(6)]
    found = spread(every, 50)
    assert len({item.key for item in found}) == 50 and len({item.problem_id for item in found}) >= 49
    places = [int(item.key.rpartition("/")[2]) for item in found]
    assert all(7 <= places.count(place) <= 10 for place in range(6)), places
