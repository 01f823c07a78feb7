"""BIG-Bench Hard (Suzgun et al. 2022, arXiv:2210.09261), one task at a time.

dataset: {name: bbh, path: data/bbh, task: date_understanding}       # data/bbh/date_understanding.json
dataset: {name: bbh, path: data/bbh/date_understanding.json}         # {examples: [{input, target}]}
"""

from __future__ import annotations

import re

from pydantic import Field

from tribunal.core.config import DatasetConfig
from tribunal.core.errors import DataError, UserError
from tribunal.core.records import Problem
from tribunal.datasets import answers
from tribunal.datasets.rows import Row, Source, finish, from_hub, local_file, read_file

CURE = "a BBH example is {input, target}"
_OPTIONS = re.compile(r"^\(([A-Z])\)\s*(.+?)\s*$", re.MULTILINE)


class Dataset(DatasetConfig):
    """Tasks with options '(A) ...' in the input are multiple choice; the others are graded as text or numbers.

    A row whose target is none of its own options cannot be graded (`movie_recommendation` has one); it is left out
    when ``skip_faulty`` is set and an error otherwise.
    """

    repository: str = Field("lukaemon/bbh", description="Hugging Face dataset with one subset per task; give its commit as `revision`")
    task: str | None = Field(None, description="e.g. date_understanding; a local file says it by its own name")
    skip_faulty: bool = Field(False, description="leave out rows whose target is none of their options")

    def problems(self) -> list[Problem]:
        task, source = self._source()
        found = ((self._problem(row, index, task, source.revision), row) for index, row in enumerate(source.rows))
        return finish(((problem, row) for problem, row in found if problem is not None), self.limit)

    def _source(self) -> tuple[str, Source]:
        if self.path is not None and self.path.is_file():
            return self.task or self.path.stem, read_file(self.path)
        if self.task is None:
            listed = sorted(path.stem for path in self.path.glob("*.json")) if self.path and self.path.is_dir() else []
            known = f"one of {', '.join(listed[:30])}" if listed else "e.g. date_understanding"
            raise UserError(f"dataset.task: missing; name the BBH task, {known}")
        if self.path is None:
            return self.task, from_hub(self.repository, self.task, self.split, self.revision)
        return self.task, read_file(local_file(self.path, [f"{self.task}.json", f"{self.task}.jsonl"]))

    def _problem(self, row: Row, index: int, task: str, revision: str) -> Problem | None:
        question, target = row.text("input", cure=CURE), row.text("target", cure=CURE)
        choices, gold = _options(question), target
        if choices is not None:
            letter = answers.choice_letter(target, choices)
            if letter is None:
                if self.skip_faulty:
                    return None
                raise DataError(
                    f"{row.where}: target: {target!r} is none of the options {choices}; mend the row, or leave such rows out with "
                    "dataset.skip_faulty=true"
                )
            gold = letter
        return Problem(
            id=f"{task}-{index:05d}",
            question=question,
            answer=gold,
            choices=choices,
            stratum=task,
            dataset=f"bbh/{task}",
            revision=revision,
        )


def _options(text: str) -> list[str] | None:
    """The options of an input, in order; None when it lists none as (A), (B), ..."""
    found = _OPTIONS.findall(text.rpartition("Options:")[2]) if "Options:" in text else []
    letters = [letter for letter, _ in found]
    return [option for _, option in found] if len(found) > 1 and letters == [chr(65 + i) for i in range(len(found))] else None
