"""MATH-500 and MATH by level."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tribunal.core.errors import DataError
from tribunal.datasets.math500 import Dataset as Math500
from tribunal.datasets.math_levels import Dataset as MathLevels


def row(level, **more):
    return {"problem": f"p{level}", "solution": "so \\boxed{1} no, \\boxed{\\frac{1}{2}}.", "level": level, "type": "Number Theory", **more}


def write(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_gold_is_the_answer_field_or_the_last_box_of_the_solution(tmp_path):
    path = write(tmp_path / "test.jsonl", [row(2), row("Level 4", answer="7"), row(1, solution="\\boxed{\\text{(A)}}")])
    problems = Math500(name="math500", path=path).problems()
    assert [(problem.answer, problem.stratum) for problem in problems] == [
        ("\\frac{1}{2}", "level 2"),
        ("7", "level 4"),
        ("\\text{(A)}", "level 1"),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"solution": "no box"}, "no \\\\boxed"), ({"level": "hard"}, "'hard' is not 1 to 5"), ({"level": None}, "level: missing")],
)
def test_a_row_without_gold_or_level_is_refused_by_line(tmp_path, bad, message):
    path = write(tmp_path / "test.jsonl", [row(2), row(2) | bad])
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        Math500(name="math500", path=path).problems()


def test_only_the_wanted_levels_and_subjects_are_kept(tmp_path):
    path = write(tmp_path / "test.jsonl", [row("Level 1"), row("Level 3"), row("Level ?"), row("Level 5", type="Geometry")])
    assert [problem.stratum for problem in MathLevels(name="math_levels", path=path).problems()] == ["level 3", "level 5"]
    assert [problem.stratum for problem in MathLevels(name="math_levels", path=path, subjects=["geometry"]).problems()] == ["level 5"]
    with pytest.raises(DataError, match="no problem is left"):
        MathLevels(name="math_levels", path=path, levels=[2]).problems()


def test_the_original_folder_of_one_file_per_problem_is_read_in_the_order_of_its_numbers(tmp_path):
    for subject in ("algebra", "geometry"):
        for number in (10, 2):
            folder = tmp_path / "test" / subject
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.json").write_text(json.dumps(row("Level 3") | {"problem": f"{subject} {number}"}))
    problems = MathLevels(name="math_levels", path=tmp_path, subjects=["geometry", "algebra"]).problems()
    assert [problem.question for problem in problems] == ["geometry 2", "geometry 10", "algebra 2", "algebra 10"]
    with pytest.raises(DataError, match="precalculus"):
        MathLevels(name="math_levels", path=tmp_path, subjects=["precalculus"]).problems()
