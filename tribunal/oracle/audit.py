"""The label audit before an oracle is trained: refuses targets from which nothing can be learned, or everything guessed.

What it looks for has been published unnoticed: one and the same summary for 200 problems, 99.7 % of the labels in one class,
targets with exact probabilities that no answer can match, test problems that were trained on.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from tribunal.core.config import Section
from tribunal.core.errors import LabelError
from tribunal.core.records import Problem
from tribunal.oracle.examples import Example
from tribunal.oracle.tasks.task import NEEDED_FROM, SENTENCE_ENDS, task_class

log = logging.getLogger(__name__)
Json = dict[str, Any]
SPLITS = ("train", "validation", "test")
EXACT_NUMBER = re.compile(r"(?<![\w.])\d*\.\d{2,}(?![\w.])|(?<![\w.])\d+(?:\.\d+)?\s?%")
"""Two or more decimals, or a percentage."""
LEAST_TESTED = 2
"""Test problems without which evaluate_oracle has nobody to borrow activations from."""


class AuditSettings(Section):
    """What the label audit refuses."""

    max_class_share: float = Field(0.9, gt=0, le=1, description="refuse a task whose most frequent target has a larger share")
    min_distinct_share: float = Field(
        0.2, ge=0, le=1, description="refuse an open task with fewer distinct targets per example that could have one of its own"
    )
    max_exact_numbers: float = Field(
        0.2, ge=0, le=1, description="refuse a task of free answers with more targets that hold an exact number"
    )
    min_per_split: int = Field(20, ge=1, description="refuse a task with fewer examples in a split")


@dataclass
class _Task:
    """What is counted of one task."""

    kind: str
    whole: bool
    splits: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    shown: dict[str, str] = field(default_factory=dict)
    problems: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    tested: set[str] = field(default_factory=set)
    traces: set[str] = field(default_factory=set)
    empty: int = 0
    cut: int = 0
    exact: int = 0
    longest: int = 0

    @property
    def n(self) -> int:
        return sum(self.splits.values())


class LabelAudit:
    """The table and what is wrong with it.

    Attributes:
        rows: by task, what ``audit.json`` holds.
        refusals: one line for each reason not to train on a task; names the task, the value, the limit and what to do.
        warnings: of the job that made the labels.
    """

    def __init__(self, rows: dict[str, Json], refusals: list[str], warnings: list[str]) -> None:
        self.rows = rows
        self.refusals = refusals
        self.warnings = warnings

    def table(self) -> str:
        """The rows as text, a line for each task."""
        head = f"{'task':<22}{'train':>8}{'valid.':>8}{'test':>8}{'problems':>10}{'distinct':>10}{'top share':>11}  most frequent target"
        lines = [head]
        for name, row in self.rows.items():
            counts = "".join(f"{row['splits'][split]:>8}" for split in SPLITS)
            shown = row["top_target"] if len(row["top_target"]) <= 40 else row["top_target"][:37] + "..."
            lines.append(f"{name:<22}{counts}{row['problems']:>10}{row['distinct']:>10}{row['top_share']:>11.1%}  {shown!r}")
        return "\n".join(lines)

    def require(self) -> None:
        """Tell every warning, and stop before training when there is anything to refuse.

        Raises:
            LabelError: the table, every reason, and how to go on.
        """
        for line in self.warnings:
            log.warning("label_sentences: %s", line)
        if self.refusals:
            reasons = "\n".join(f"  - {line}" for line in self.refusals)
            raise LabelError(f"the oracle's labels cannot be trained on:\n{reasons}\n{self.table()}")

    def as_json(self) -> Json:
        return {"tasks": self.rows, "refusals": self.refusals, "warnings": self.warnings}


def audit_examples(
    examples: Iterable[Example],
    settings: AuditSettings,
    *,
    tasks: Iterable[str] = (),
    problems: Mapping[str, Problem] | None = None,
    count_tokens: Callable[[str], int] | None = None,
    max_new_tokens: int | None = None,
    warnings: Sequence[str] = (),
    where: str = "train_oracle",
) -> LabelAudit:
    """Count the examples, streamed, and say what is wrong.

    Args:
        examples: of all splits.
        tasks: those that were asked for: one without any example is refused.
        problems: by id, to find the same question under two ids.
        count_tokens: an answer's number of tokens; without it lengths are not looked at.
        max_new_tokens: of a generated answer: a longer target could never be answered whole.
        warnings: of the job that made the labels, told with the rest.
        where: the job's section, for messages.
    """
    counted: dict[str, _Task] = {name: _fresh(name) for name in tasks}
    split_of_problem: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        split_of_problem[example.problem_id].add(example.split)
        if example.task not in counted:
            counted[example.task] = _fresh(example.task)
        _count(counted[example.task], example, count_tokens)
    refusals = [line for name, task in counted.items() for line in _judge(name, task, settings, max_new_tokens, where)]
    refusals += _overlap(split_of_problem, problems)
    return LabelAudit({name: _row(task) for name, task in counted.items()}, refusals, list(warnings))


def _fresh(name: str) -> _Task:
    kind = task_class(name)
    return _Task(kind.kind, kind.whole_targets)


def _count(task: _Task, example: Example, count_tokens: Callable[[str], int] | None) -> None:
    target = " ".join(example.target.split())
    name = hashlib.blake2b(target.encode(), digest_size=12).hexdigest()  # long targets are not held
    task.splits[example.split] += 1
    task.targets[name] += 1
    task.shown.setdefault(name, target[:60])
    task.problems[example.split].add(example.problem_id)
    if example.split == "test":
        task.tested.add(example.group)
    task.traces.add(example.trace_key)
    task.empty += not target
    task.cut += bool(target) and task.whole and target[-1] not in SENTENCE_ENDS
    task.exact += task.kind == "open" and EXACT_NUMBER.search(target) is not None
    if count_tokens is not None and target:
        task.longest = max(task.longest, count_tokens(example.target))


def _row(task: _Task) -> Json:
    top, count = task.targets.most_common(1)[0] if task.targets else ("", 0)
    return {
        "kind": task.kind,
        "examples": task.n,
        "splits": {split: task.splits[split] for split in SPLITS},
        "problems": len(set().union(*task.problems.values())),
        "traces": len(task.traces),
        "distinct": len(task.targets),
        "top_target": task.shown.get(top, ""),
        "top_share": round(count / task.n, 6) if task.n else 0.0,
        "empty": task.empty,
        "cut_off": task.cut,
        "exact_numbers": task.exact,
        "longest_tokens": task.longest or None,
        "targets": {task.shown[name]: n for name, n in task.targets.most_common(20)} if task.kind != "open" else None,
    }


def _judge(name: str, task: _Task, settings: AuditSettings, max_new_tokens: int | None, where: str) -> list[str]:
    """Every reason to refuse this task."""
    if not task.n:
        kind = task_class(name)
        needs = "; ".join(filter(None, [*(NEEDED_FROM[need] for need in sorted(kind.needs)), kind.asks_where]))
        return [
            f"{name}: no examples at all: no trace brings what it asks about ({needs or 'a verdict that is asked about'}); take it out of "
            f"{where}.tasks, or make the labels it needs"
        ]
    found = []
    row = _row(task)
    if row["top_share"] > settings.max_class_share:
        cure = "leave the task out, balance its labels, or fix the job that makes them"
        found.append(
            f"{name}: {row['top_share']:.1%} of {task.n} targets are {row['top_target']!r} (at most {settings.max_class_share:.0%}): "
            f"a constant answer scores that; {cure}, or raise {where}.audit.max_class_share"
        )
    if task.kind == "open":
        share = len(task.targets) / task.n
        if share < settings.min_distinct_share:
            found.append(
                f"{name}: {len(task.targets)} distinct targets in {task.n} ({share:.1%}, at least {settings.min_distinct_share:.0%}): "
                f"they can be learned by heart; check the label maker, or lower {where}.audit.min_distinct_share"
            )
        if task.exact / task.n > settings.max_exact_numbers:
            found.append(
                f"{name}: {task.exact} of {task.n} targets hold an exact number (two decimals or per cent), which no answer can match; "
                f"sort the values into buckets, or raise {where}.audit.max_exact_numbers"
            )
    if task.empty:
        found.append(f"{name}: {task.empty} of {task.n} targets are empty; fix the label maker or leave the task out")
    if task.cut:
        found.append(
            f"{name}: {task.cut} of {task.n} targets end in mid-sentence: cut off; give the label maker more room, or leave "
            f"truncated traces out of {where}.examples.verdicts"
        )
    if max_new_tokens is not None and task.longest > max_new_tokens:
        found.append(
            f"{name}: targets of up to {task.longest} tokens, but answers end at {max_new_tokens} and could never be right; shorten the "
            f"targets, or raise {where}.max_new_tokens"
        )
    if short := [split for split in SPLITS if task.splits[split] < settings.min_per_split]:
        listed = ", ".join(f"{split} {task.splits[split]}" for split in short)
        found.append(
            f"{name}: too few examples ({listed}; at least {settings.min_per_split} wanted in each split): take more traces, or lower "
            f"{where}.audit.min_per_split"
        )
    elif len(task.tested) < LEAST_TESTED:
        found.append(
            f"{name}: its {task.splits['test']} test examples are all of one problem, with which nothing can be compared; take traces of "
            f"more problems, or raise {where}.examples.test_share"
        )
    return found


def _overlap(split_of_problem: Mapping[str, set[str]], problems: Mapping[str, Problem] | None) -> list[str]:
    """Problems that are in more than one split, by id or word for word."""
    splits: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, set[str]] = defaultdict(set)
    for identity, found in split_of_problem.items():
        name = " ".join(problems[identity].question.lower().split()) if problems and identity in problems else identity
        splits[name] |= found
        ids[name].add(identity)
    shared = sorted(name for name, found in splits.items() if len(found) > 1)
    if not shared:
        return []
    named = " and ".join(f"'{identity}'" for identity in sorted(ids[shared[0]])[:2])
    return [
        f"{len(shared)} of {len(splits)} problems are in more than one split, first {named}: what is tested was trained on; "
        "take duplicates out of the dataset, or make the examples again with one version of the settings"
    ]
