"""GSM8K: grade-school word problems with a whole-number answer after '####' (Cobbe et al. 2021, arXiv:2110.14168).

dataset: {name: gsm8k, split: test}                       # openai/gsm8k at a pinned commit
dataset: {name: gsm8k, path: data/gsm8k/test.jsonl}       # the same rows as JSONL {question, answer}
"""

from __future__ import annotations

from pydantic import Field

from tribunal.core.config import DatasetConfig
from tribunal.core.errors import DataError
from tribunal.core.records import Problem
from tribunal.datasets import answers
from tribunal.datasets.rows import Row, Source, finish, from_hub, local_file, read_file

CURE = "a GSM8K row is {question, answer} with the gold number after '####'"


class Dataset(DatasetConfig):
    """The stratum is the number of lines of the gold solution (its reasoning steps)."""

    repository: str = Field("openai/gsm8k", description="Hugging Face dataset")
    revision: str | None = Field("cc7b047b6e5bb11b4f1af84efc572db110a51b3c", description="pinned commit of the Hugging Face dataset")

    def problems(self) -> list[Problem]:
        source = self._source()
        return finish(((_problem(row, index, source.revision), row) for index, row in enumerate(source.rows)), self.limit)

    def _source(self) -> Source:
        if self.path is None:
            return from_hub(self.repository, "main", self.split, self.revision)
        return read_file(local_file(self.path, [f"{self.split}.jsonl", f"gsm8k/{self.split}.jsonl"]))


def _problem(row: Row, index: int, revision: str) -> Problem:
    question, solution = row.text("question", cure=CURE), row.text("answer", cure=CURE)
    reasoning, marker, gold = solution.rpartition("####")
    number = answers.plain_number(gold if marker else solution)
    if number is None:
        shown = gold.strip() if marker else solution
        raise DataError(f"{row.where}: answer: the gold {shown[:60]!r} is not a number; {CURE}")
    steps = len([line for line in reasoning.splitlines() if line.strip()])
    return Problem(id=f"gsm8k-{index:05d}", question=question, answer=number, stratum=_stratum(steps), dataset="gsm8k", revision=revision)


def _stratum(steps: int) -> str | None:
    """Classes that are large enough to be reported: 2 steps, 3 steps, 4 steps, 5 or more."""
    if steps == 0:
        return None
    return "1-2 steps" if steps <= 2 else f"{steps} steps" if steps <= 4 else "5+ steps"
