"""GPQA: graduate-level multiple choice (Rein et al. 2023, arXiv:2311.12022), by default its Diamond subset.

dataset: {name: gpqa}
dataset: {name: gpqa, path: gpqa_diamond.csv}
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from tribunal.core.config import DatasetConfig
from tribunal.core.records import Problem
from tribunal.datasets.rows import Row, finish, from_hub, local_file, option_lines, read_file

CURE = "a GPQA row has Question, Correct Answer and Incorrect Answer 1 to 3"


class Dataset(DatasetConfig):
    """The stratum is the domain (Physics, Chemistry, Biology). Options are shuffled problem by problem."""

    repository: str = Field("Idavidrein/gpqa", description="Hugging Face dataset (gated: accept its terms and log in)")
    revision: str | None = Field("633f5ee89ab8ad4522a9f850766b73f62147ffdd", description="pinned commit of the Hugging Face dataset")
    split: str = "train"
    subset: Literal["gpqa_diamond", "gpqa_main", "gpqa_extended"] = "gpqa_diamond"
    seed: int = Field(0, ge=0, description="of the order of the options; a problem's order depends on it and on the problem alone")

    def problems(self) -> list[Problem]:
        if self.path is None:
            source = from_hub(self.repository, self.subset, self.split, self.revision)
        else:
            source = read_file(local_file(self.path, [f"{self.subset}.csv", f"{self.subset}.jsonl"]))
        return finish(((self._problem(row, index, source.revision), row) for index, row in enumerate(source.rows)), self.limit)

    def _problem(self, row: Row, index: int, revision: str) -> Problem:
        question = row.text("Question", cure=CURE)
        right = row.text("Correct Answer", cure=CURE)
        wrong = [row.text(f"Incorrect Answer {number}", cure=CURE) for number in (1, 2, 3)]
        order = sorted(range(4), key=lambda option: hashlib.blake2b(f"{self.seed}/{question}/{option}".encode()).digest())
        choices = [[right, *wrong][option] for option in order]
        return Problem(
            id=f"{self.subset}-{index:05d}",
            question=f"{question}\n\n{option_lines(choices)}",
            answer="ABCD"[order.index(0)],
            choices=choices,
            stratum=row.optional("High-level domain"),
            dataset=self.subset,
            revision=revision,
        )
