"""MATH (Hendrycks et al. 2021, arXiv:2103.03874), by default its harder levels 3 to 5.

dataset: {name: math_levels, levels: [3, 4, 5], subjects: [algebra, number_theory]}
dataset: {name: math_levels, path: MATH}       # MATH/test/<subject>/*.json, MATH/test.jsonl, or one JSONL file
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from tribunal.core.config import DatasetConfig
from tribunal.core.records import Problem
from tribunal.datasets.math500 import level, problem
from tribunal.datasets.rows import Row, Source, finish, from_hub, local_file, read_file, revision_of

Subject = Literal[
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"
]  # fmt: skip


class Dataset(DatasetConfig):
    """The stratum is the level. Rows of other levels, or of unknown level, are left out."""

    repository: str = Field("EleutherAI/hendrycks_math", description="Hugging Face dataset with one subset per subject")
    revision: str | None = Field("21a5633873b6a120296cce3e2df9d5550074f4a3", description="pinned commit of the Hugging Face dataset")
    levels: list[Literal[1, 2, 3, 4, 5]] = Field([3, 4, 5], min_length=1)
    subjects: list[Subject] = Field(
        ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"],
        min_length=1,
        description="subjects to use, in this order",
    )

    def problems(self) -> list[Problem]:
        return finish(self._wanted(), self.limit)

    def _wanted(self) -> Iterator[tuple[Problem, Row]]:
        for label, source in self._sources():
            for index, row in enumerate(source.rows):
                subject = row.values.get("type") or row.values.get("subject")
                known = str(subject).lower().replace(" & ", " and ").replace(" ", "_") if subject else label
                if (level(row) in self.levels) and (label in self.subjects or known in (None, *self.subjects)):
                    yield problem(row, f"math-{label or 'row'}-{index:05d}", "math_levels", source.revision), row

    def _sources(self) -> Iterator[tuple[str | None, Source]]:
        """(subject, rows) in order; the subject is None where one file holds several."""
        if self.path is None:
            for subject in self.subjects:
                yield subject, from_hub(self.repository, subject, self.split, self.revision)
        elif (folder := self.path / self.split).is_dir():
            for subject in self.subjects:
                yield subject, _folder(folder / subject)
        else:
            yield None, read_file(local_file(self.path, [f"{self.split}.jsonl", f"{self.split}/<subject>/*.json"]))


def _folder(folder: Path) -> Source:
    """The original layout: one JSON object per file, named by number."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (int(path.stem) if path.stem.isdigit() else -1, path.stem))
    if not paths:
        local_file(folder, ["1.json"])  # says what is missing
    return Source([row for path in paths for row in read_file(path).rows], revision_of(paths))
