"""What a trained oracle reads: its answers on held-out problems beside those of every control, and the verdict in words.

Conditions under which a question is put, the first three to every adapter (the best checkpoint, other kept ones, published ones):

* ``oracle``: its own activations.
* ``shuffled``: the activations of another problem's item of the same task.
* ``zeroed``: the same prompt, placeholders included, and nothing injected.
* ``text_only``: that prompt to an adapter that was trained on such prompts without any activation.

``majority`` is the most frequent target of the training examples, of two answers with their shares as log-odds; ``linear_probe``
is fitted on the same activations and split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tribunal.core.errors import DataError
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
from tribunal.oracle.tasks.task import task_class
from tribunal.oracle.training import spread
from tribunal.oracle.vectors import VectorLayout, Vectors

CONDITIONS = ("oracle", "shuffled", "zeroed")
"""Under which each adapter is asked."""
PROBE_ITEMS = 4000
"""Training examples of one task that its linear probe is fitted on, at most."""


class Who(NamedTuple):
    """The adapter that answers: the best checkpoint, unless another step or a published adapter is named."""

    step: int | None = None
    adapter: str | None = None

    @property
    def name(self) -> str:
        """In rows and items; empty for the best checkpoint."""
        return f"step {self.step}" if self.step is not None else f"adapter {self.adapter}" if self.adapter is not None else ""

    @property
    def key(self) -> str:
        if self.adapter is not None:
            return f"adapter-{sha256_json(self.adapter)[:16]}"
        return "best" if self.step is None else f"step-{self.step:06d}"


BEST = Who()


class Unit(NamedTuple):
    """One durable piece: the answers to some items of one task under one condition."""

    task: str
    condition: str  # or "text_only", or "linear_probe", which answers all items at once
    chunk: int = 0  # of items
    who: Who = BEST

    @property
    def key(self) -> str:
        return f"{self.who.key}/{self.condition}/{self.task}/{self.chunk:05d}"


class OracleEvaluation:
    """The items, the plan of what is asked, and how each unit is done.

    Args:
        folder: results of train_oracle.
        steps: kept checkpoints that are asked too, besides the best.
        published: adapters of others (PEFT folders or hub names) that are put the same questions in the same way.
        items_per_task: held-out items of each task, at most.
        chunk: items answered together; decides batch shapes.
    Raises:
        DataError: a task's items are of fewer than two problems, so that there is nothing to shuffle or to compare.
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
        for task, items in self.items.items():
            _require_two_problems(task, items)
        self._on_model: tuple[str, Who] | None = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """Of the best checkpoint, the control that was trained beside it among them."""
        return (*CONDITIONS, TEXT_ONLY) if self.facts.text_only_steps else CONDITIONS

    @property
    def others(self) -> list[Who]:
        """The adapters that are asked besides the best checkpoint."""
        steps = [Who(step=step) for step in self.steps if step != self.facts.best_step]
        return steps + [Who(adapter=adapter) for adapter in self.published]

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
        asked = [(condition, BEST) for condition in self.conditions]
        asked += [(condition, who) for who in self.others for condition in CONDITIONS]
        return [unit for task in self.probed for unit in self.units(task, "linear_probe")] + [
            unit for condition, who in asked for task in self.items for unit in self.units(task, condition, who)
        ]

    def units(self, task: str, condition: str, who: Who = BEST) -> list[Unit]:
        """The units that hold a task's answers under one condition, in the items' order."""
        chunks = 1 if condition == "linear_probe" else -(-len(self.items[task]) // self.chunk)
        return [Unit(task, condition, chunk, who) for chunk in range(chunks)]

    def write_vectors(self, number: int, path: Path) -> Json:
        """Write one file of vectors; returns its record."""
        self.layout.write(number, self.source, path, self.loaded.model.dtype)
        return {"file": path.name, "sha256": sha256_file(path)}

    def run(self, unit: Unit, vectors: Vectors) -> Json:
        """The answers of a unit, as its record."""
        if unit.condition == "linear_probe":
            train, validation = self.probed[unit.task]
            by_question = task_class(unit.task).kind == "yes_no"
            items, pair = self.items[unit.task], self.pair(unit.task)
            answers = answer_by_probe(train, validation, items, vectors, odds=pair, by_question=by_question)
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
        others = [other for other in self.items[item.task] if other.group != item.group]
        return others[int(rng_of(self.seed, "shuffled", item.key).integers(len(others)))]

    def majority(self, task: str) -> ProbeAnswer:
        """The most frequent target of the task's training examples; of two answers with the log-odds of their shares."""
        counts = Counter(e.target for e in self.corpus.examples if e.task == task and e.split == "train")
        odds = float(np.log((counts[pair[1]] + 1) / (counts[pair[0]] + 1))) if (pair := self.pair(task)) else None
        return ProbeAnswer(min(counts, key=lambda target: (-counts[target], target)), odds)

    def _asked(self, item: Example, condition: str, vectors: Vectors) -> Asked:
        if condition in ("zeroed", TEXT_ONLY):
            return Asked(item, None)
        if condition == "shuffled":
            other = self.partner(item)
            lent = item.model_copy(update={"tokens": other.tokens, "layers": other.layers})
            return Asked(lent, vectors.of(other))
        return Asked(item, vectors.of(item))

    def _put_on(self, unit: Unit) -> None:
        """Put the adapter that answers onto the model, unless it is there."""
        who, wanted = unit.who, ((TEXT_ONLY if unit.condition == TEXT_ONLY else ADAPTER), unit.who)
        if self._on_model == wanted:
            return
        if who.adapter is not None:
            folder = find_adapter(who.adapter)
        else:
            folder = self.folder / wanted[0] if who.step is None else self.facts.adapter(self.folder, who.step)
        load_adapter(self.loaded, folder).eval()
        self._on_model = wanted

    def answers(self, records: Mapping[str, Json], task: str, condition: str, who: Who = BEST) -> list[ProbeAnswer] | None:
        """The answers to a task's items, in their order; None where a unit of them was set aside."""
        units = self.units(task, condition, who)
        if any(unit.key not in records for unit in units):
            return None
        return [ProbeAnswer(*answer) for unit in units for answer in records[unit.key]["answers"]]


def _require_two_problems(task: str, items: Sequence[Example]) -> None:
    if (count := len({item.group for item in items})) < 2:
        raise DataError(
            f"evaluate_oracle: task {task} has {len(items)} held-out items of {count} problem{'s' * (count != 1)}; two problems are needed "
            "at least: take more traces, or raise examples.test_share and train again"
        )


def _record(answer: ProbeAnswer) -> list[Any]:
    """Nine digits of a log-odds are more than a repetition on other hardware would keep."""
    return [answer.text, None if answer.odds is None else float(np.format_float_positional(answer.odds, 9, fractional=False))]
