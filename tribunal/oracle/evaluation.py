"""What a trained oracle reads: its answers on held-out problems beside those of every control, and the verdict in words.

Conditions under which a question is put:

* ``oracle``: its own activations.
* ``shuffled``: the activations of another problem's item of the same task. ``zeroed``: placeholders, but nothing injected.
* ``text_only``: an adapter that was trained as long on the questions without any activation, asked without any.
* ``bare``: the oracle itself asked without placeholders; cheaper, and unlike what it was trained on, so a detail and no control.

``majority`` is the most frequent target of the training examples; ``linear_probe`` is fitted on the same activations and split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tribunal.core.storage import sha256_file, sha256_json
from tribunal.core.work import Json
from tribunal.models.adapters import find_adapter, load_adapter, require_fit
from tribunal.models.loading import LoadedModel
from tribunal.models.oracle_batches import Injection
from tribunal.oracle.activations import ActivationSource
from tribunal.oracle.answering import Answerer, Asked
from tribunal.oracle.corpus import Corpus
from tribunal.oracle.examples import Example, rng_of
from tribunal.oracle.probe import ProbeAnswer, answer_by_probe
from tribunal.oracle.prompts import OraclePrompts
from tribunal.oracle.settings import ADAPTER, TEXT_ONLY, OracleFacts
from tribunal.oracle.training import spread
from tribunal.oracle.vectors import VectorLayout, Vectors

CONDITIONS = ("oracle", "shuffled", "zeroed", "bare", "text_only")
PROBE_ITEMS = 4000
"""Training examples of one task that its linear probe is fitted on, at most."""


class Unit(NamedTuple):
    """One durable piece: the answers to some items of one task under one condition."""

    task: str
    condition: str  # or "linear_probe", which answers all items at once
    chunk: int = 0  # of items
    step: int | None = None  # of a kept checkpoint; None: the best one
    adapter: str | None = None  # a published one that is asked instead

    @property
    def key(self) -> str:
        who = "best" if self.step is None else f"step-{self.step:06d}"
        if self.adapter is not None:
            who = f"adapter-{sha256_json(self.adapter)[:16]}"
        return f"{who}/{self.condition}/{self.task}/{self.chunk:05d}"


class OracleEvaluation:
    """The items, the plan of what is asked, and how each unit is done.

    Args:
        folder: results of train_oracle.
        steps: kept checkpoints that are asked too, besides the best.
        published: adapters of others (PEFT folders or hub names) that are put the same questions in the same way.
        items_per_task: held-out items of each task, at most.
        chunk: items answered together; decides batch shapes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        facts: OracleFacts,
        folder: Path,
        corpus: Corpus,
        source: ActivationSource,
        *,
        steps: Sequence[int],
        published: Sequence[str],
        items_per_task: int,
        chunk: int,
        traces_per_file: int,
        seed: int,
    ) -> None:
        self.loaded, self.facts, self.folder, self.corpus, self.source = loaded, facts, folder, corpus, source
        self.steps, self.published, self.chunk, self.traces_per_file, self.seed = list(steps), list(published), chunk, traces_per_file, seed
        self.prompts = OraclePrompts(loaded, facts.placeholder)
        self.answerer = Answerer(loaded, self.prompts, Injection(**facts.injection), slots=facts.slots, max_new_tokens=facts.max_new_tokens)
        for adapter in self.published:
            require_fit(loaded, adapter)
        test = corpus.of_split("test")
        self.items = {task: spread([e for e in test if e.task == task], items_per_task) for task in facts.tasks}
        self._on_model: tuple[str, int | None, str | None] | None = None

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        return tuple(name for name in CONDITIONS if name != TEXT_ONLY or self.facts.text_only_steps)

    @cached_property
    def probed(self) -> dict[str, tuple[list[Example], list[Example]]]:
        """By task, the training and validation examples of its linear probe; tasks with free answers have none."""
        found = {}
        for task in self.facts.tasks:
            if self.items[task] and self.items[task][0].choices:
                mine = [e for e in self.corpus.examples if e.task == task]
                train, validation = ([e for e in mine if e.split == split] for split in ("train", "validation"))
                found[task] = spread(train, PROBE_ITEMS), spread(validation, PROBE_ITEMS)
        return found

    @cached_property
    def layout(self) -> VectorLayout:
        probed = [example for pair in self.probed.values() for part in pair for example in part]
        order = {key: number for number, key in enumerate(self.corpus.traces.keys)}
        every = [*(example for items in self.items.values() for example in items), *probed]
        return VectorLayout(sorted(every, key=lambda example: order[example.trace_key]), self.traces_per_file)

    def plan(self) -> list[Unit]:
        """Every unit in order: probes first, then adapter by adapter."""
        asked: list[tuple[str, int | None, str | None]] = [(condition, None, None) for condition in self.conditions]
        asked += [("oracle", step, None) for step in self.other_steps]
        asked += [("oracle", None, adapter) for adapter in self.published]
        return [unit for task in self.probed for unit in self.units(task, "linear_probe")] + [
            unit for who in asked for task in self.items for unit in self.units(task, *who)
        ]

    def units(self, task: str, condition: str, step: int | None = None, adapter: str | None = None) -> list[Unit]:
        """The units that hold a task's answers under one condition, in the items' order."""
        chunks = 1 if condition == "linear_probe" else -(-len(self.items[task]) // self.chunk)
        return [Unit(task, condition, chunk, step, adapter) for chunk in range(chunks)]

    @property
    def other_steps(self) -> list[int]:
        """The kept checkpoints that are asked besides the best."""
        return [step for step in self.steps if step != self.facts.best_step]

    def write_vectors(self, number: int, path: Path) -> Json:
        """Write one file of vectors; returns its record."""
        self.layout.write(number, self.source, path, self.loaded.model.dtype)
        return {"file": path.name, "sha256": sha256_file(path)}

    def run(self, unit: Unit, vectors: Vectors) -> Json:
        """The answers of a unit, as its record."""
        if unit.condition == "linear_probe":
            train, validation = self.probed[unit.task]
            answers = answer_by_probe(train, validation, self.items[unit.task], vectors, odds=self.pair(unit.task))
            return {"answers": [_record(answer) for answer in answers]}
        items = self.items[unit.task][unit.chunk * self.chunk : (unit.chunk + 1) * self.chunk]
        self._put_on(unit)
        asked = [self._asked(item, unit.condition, vectors) for item in items]
        texts, pair = self.answerer.answers(asked), self.pair(unit.task)
        odds = self.answerer.log_odds(asked, pair) if pair else [None] * len(asked)
        return {"answers": [_record(ProbeAnswer(text, value)) for text, value in zip(texts, odds)]}

    def pair(self, task: str) -> tuple[str, str] | None:
        """The two answers of a task that has two, the one that counts as positive last."""
        choices = self.items[task][0].choices if self.items[task] else []
        if len(choices) != 2:
            return None
        return ("no", "yes") if set(choices) == {"no", "yes"} else (choices[0], choices[1])

    def partner(self, item: Example) -> Example:
        """The item of the same task and another problem whose activations ``shuffled`` gives this one: a function of its key."""
        others = [other for other in self.items[item.task] if other.problem_id != item.problem_id]
        return others[int(rng_of(self.seed, "shuffled", item.key).integers(len(others)))] if others else item

    def majority(self, task: str) -> str:
        """The most frequent target of the task's training examples."""
        counts = Counter(e.target for e in self.corpus.examples if e.task == task and e.split == "train")
        return min(counts, key=lambda target: (-counts[target], target))

    def _asked(self, item: Example, condition: str, vectors: Vectors) -> Asked:
        if condition in ("bare", TEXT_ONLY):
            return Asked(item, None)
        if condition == "shuffled":
            other = self.partner(item)
            lent = item.model_copy(update={"tokens": other.tokens, "layers": other.layers})
            return Asked(lent, vectors.of(other))
        own = vectors.of(item)
        return Asked(item, torch.zeros_like(own) if condition == "zeroed" else own)

    def _put_on(self, unit: Unit) -> None:
        """Put the adapter that answers onto the model, unless it is there."""
        wanted = (TEXT_ONLY if unit.condition == TEXT_ONLY else ADAPTER), unit.step, unit.adapter
        if self._on_model == wanted:
            return
        if unit.adapter is not None:
            folder = find_adapter(unit.adapter)
        else:
            folder = self.folder / wanted[0] if unit.step is None else self.facts.adapter(self.folder, unit.step)
        load_adapter(self.loaded, folder).eval()
        self._on_model = wanted

    def answers(
        self, records: Mapping[str, Json], task: str, condition: str, step: int | None = None, adapter: str | None = None
    ) -> list[ProbeAnswer] | None:
        """The answers to a task's items, in their order; None where a unit of them was set aside."""
        units = self.units(task, condition, step, adapter)
        if any(unit.key not in records for unit in units):
            return None
        return [ProbeAnswer(*answer) for unit in units for answer in records[unit.key]["answers"]]


def _record(answer: ProbeAnswer) -> list[Any]:
    """Nine digits of a log-odds are more than a repetition on other hardware would keep."""
    return [answer.text, None if answer.odds is None else float(np.format_float_positional(answer.odds, 9, fractional=False))]
