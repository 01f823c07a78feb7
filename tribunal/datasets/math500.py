"""MATH-500: the 500 test problems of Lightman et al. (2023, arXiv:2305.20050), with levels 1 to 5.

dataset: {name: math500}
dataset: {name: math500, path: test.jsonl}       # JSONL {problem, answer or solution, level}
"""

from __future__ import annotations

from pydantic import Field

from tribunal.core.config import DatasetConfig
from tribunal.core.errors import DataError
from tribunal.core.records import Problem
from tribunal.datasets import answers
from tribunal.datasets.rows import Row, finish, from_hub, local_file, read_file

CURE = "a MATH row is {problem, level} with the gold as `answer` or in the last \\boxed of `solution`"


class Dataset(DatasetConfig):
    repository: str = Field("HuggingFaceH4/MATH-500", description="Hugging Face dataset")
    revision: str | None = Field("6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", description="pinned commit of the Hugging Face dataset")

    def problems(self) -> list[Problem]:
        if self.path is None:
            source = from_hub(self.repository, None, self.split, self.revision)
        else:
            source = read_file(local_file(self.path, [f"{self.split}.jsonl", "math500.jsonl", "test.jsonl"]))
        rows = enumerate(source.rows)
        return finish(((problem(row, f"math500-{index:05d}", "math500", source.revision), row) for index, row in rows), self.limit)


def problem(row: Row, identity: str, dataset: str, revision: str) -> Problem:
    """A row of MATH in any of its forms.

    Raises:
        DataError: no question, no level, or no gold answer.
    """
    question = row.text("problem", "question", cure=CURE)
    if row.values.get("answer") is not None:
        gold = row.text("answer", cure=CURE)
    else:
        solution = row.text("solution", "answer", cure=CURE)
        boxed = answers.boxed(solution)
        if boxed is None:
            raise DataError(f"{row.where}: solution: no \\boxed answer in it; {CURE}")
        gold = boxed
    number = level(row)
    return Problem(
        id=identity,
        question=question,
        answer=gold,
        stratum=f"level {number}" if number else None,
        dataset=dataset,
        revision=revision,
    )


def level(row: Row) -> int | None:
    """1 to 5 from 3, '3' or 'Level 3'; None for 'Level ?', which two rows of MATH have.

    Raises:
        DataError: anything else.
    """
    text = row.text("level", cure=CURE).lower().removeprefix("level").strip()
    if text == "?":
        return None
    if text not in {"1", "2", "3", "4", "5"}:
        raise DataError(f"{row.where}: level: {row.values['level']!r} is not 1 to 5 or 'Level 1' to 'Level 5'")
    return int(text)
