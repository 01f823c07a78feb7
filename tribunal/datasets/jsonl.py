"""Your own problems, one JSON object per line.

    dataset: {name: jsonl, path: mine.jsonl}

Fields: ``question``, ``answer``, and optionally ``choices`` (a list; ``answer`` is then a letter or one of them), ``id``
and ``stratum``; or ``prefix`` and ``suffix`` for text that the model continues.
"""

from __future__ import annotations

from tribunal.core.config import DatasetConfig
from tribunal.core.errors import DataError, UserError
from tribunal.core.records import Problem
from tribunal.datasets import answers
from tribunal.datasets.rows import Row, checked_keys, finish, local_file, option_lines, read_file

CURE = "a row is {question, answer, choices?, id?, stratum?} or {prefix, suffix, id?, stratum?}"
FIELDS = ("question", "answer", "choices", "id", "stratum", "prefix", "suffix")


class Dataset(DatasetConfig):
    def problems(self) -> list[Problem]:
        if self.path is None:
            raise UserError("dataset.path: missing; `jsonl` reads your own file: `dataset: {name: jsonl, path: FILE}`")
        source = read_file(local_file(self.path, [f"{self.split}.jsonl", "problems.jsonl"]))
        return finish(((_problem(row, index, source.revision), row) for index, row in enumerate(source.rows)), self.limit)


def _problem(row: Row, index: int, revision: str) -> Problem:
    checked_keys(row, FIELDS)
    identity = row.optional("id") or f"row-{index:05d}"
    stratum = row.optional("stratum")
    if "prefix" in row.values or "suffix" in row.values:
        row.text("prefix", cure=CURE)
        return Problem(
            id=identity,
            question=row.values["prefix"],  # as it is: a continuation's blanks matter
            answer=row.text("suffix", cure=CURE),
            kind="continuation",
            stratum=stratum,
            dataset="jsonl",
            revision=revision,
        )
    question, gold = row.text("question", cure=CURE), row.text("answer", cure=CURE)
    choices = _choices(row)
    if choices is not None:
        letter = answers.choice_letter(gold, choices)
        if letter is None:
            raise DataError(f"{row.where}: answer: {gold!r} is none of the choices {choices}; give a letter from A or one of them")
        gold = letter
        if not all(line in question for line in option_lines(choices).splitlines()):
            question = f"{question}\n\n{option_lines(choices)}"
    return Problem(id=identity, question=question, answer=gold, choices=choices, stratum=stratum, dataset="jsonl", revision=revision)


def _choices(row: Row) -> list[str] | None:
    choices = row.values.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, (str, int, float)) for c in choices):
        raise DataError(f"{row.where}: choices: expected a list of 2 to 26 texts, got {choices!r:.80}")
    texts = [str(choice).strip() for choice in choices]
    if len(set(texts)) < len(texts) or "" in texts:
        raise DataError(f"{row.where}: choices: {texts} has an empty or doubled option; each must differ")
    return texts
