"""Traces that were sampled elsewhere, read from JSONL instead of being sampled here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

from tribunal.core.errors import DataError
from tribunal.core.records import Problem
from tribunal.core.registry import nearest
from tribunal.datasets.rows import Row, checked_keys, read_file

CURE = "a row is {problem_id or question, completion or completion_ids, sample?, finish_reason?}"
FIELDS = ("problem_id", "question", "completion", "completion_ids", "sample", "finish_reason")


class ImportedTrace(NamedTuple):
    """One row: either ``text`` or ``completion_ids`` is given."""

    problem_id: str
    sample: int
    text: str | None
    completion_ids: list[int] | None
    finish_reason: Literal["stop", "length"]


def read_imported(path: Path, problems: Sequence[Problem]) -> list[ImportedTrace]:
    """Read traces and find each one's problem.

    A row names its problem by id or by its question (blanks apart). Without ``sample`` the rows of a problem are numbered in
    the order of the file; without ``finish_reason`` a trace counts as finished, so give 'length' for those that were cut off.

    Raises:
        DataError: names file, line and field.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of traces; {CURE}")
    by_id = {problem.id: problem for problem in problems}
    by_question: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_question[_squeezed(problem.question)].append(problem)
    counts: dict[str, int] = defaultdict(int)
    seen: dict[tuple[str, int], str] = {}
    traces = []
    for row in read_file(path).rows:
        checked_keys(row, FIELDS)
        problem = _problem(row, by_id, by_question)
        sample = _sample(row, counts[problem.id])
        counts[problem.id] += 1
        if (earlier := seen.get((problem.id, sample))) is not None:
            raise DataError(
                f"{row.where}: sample: {sample} of problem '{problem.id}' is there already at {earlier}; number the samples from 0"
            )
        seen[problem.id, sample] = row.where
        text, ids = _completion(row)
        traces.append(ImportedTrace(problem.id, sample, text, ids, _finish_reason(row)))
    return traces


def _problem(row: Row, by_id: dict[str, Problem], by_question: dict[str, list[Problem]]) -> Problem:
    identity = row.optional("problem_id")
    if identity is not None:
        if identity not in by_id:
            close = nearest(identity, by_id) if len(by_id) <= 1000 else "see the ids in problems.jsonl"
            raise DataError(f"{row.where}: problem_id: no problem '{identity}' in the dataset; {close}")
        return by_id[identity]
    question = row.text("question", cure=CURE)
    found = by_question.get(_squeezed(question), [])
    if len(found) != 1:
        many = f"{len(found)} problems ask" if found else "no problem of the dataset asks"
        raise DataError(f"{row.where}: question: {many} {question[:60]!r}; give problem_id instead")
    return found[0]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _sample(row: Row, default: int) -> int:
    sample = row.values.get("sample", default)
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise DataError(f"{row.where}: sample: {sample!r} is not a whole number from 0")
    return sample


def _completion(row: Row) -> tuple[str | None, list[int] | None]:
    ids = row.values.get("completion_ids")
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise DataError(f"{row.where}: completion_ids: expected a list of token ids (whole numbers from 0), got {ids!r:.60}; {CURE}")
        return None, ids
    row.text("completion", cure=CURE)
    return str(row.values["completion"]), None  # as it is: its blanks are part of the trace


def _finish_reason(row: Row) -> Literal["stop", "length"]:
    reason = row.values.get("finish_reason", "stop")
    if reason not in ("stop", "length"):
        raise DataError(f"{row.where}: finish_reason: {reason!r} is neither 'stop' nor 'length' (cut off by the token limit)")
    return cast(Literal["stop", "length"], reason)
