from __future__ import annotations

import csv
from collections import Counter

import pytest

from tribunal.core.errors import DataError
from tribunal.datasets.gpqa import Dataset

FIELDS = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "High-level domain"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "gpqa_diamond.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows([f"q{i}\nsecond line", f"right{i}", "w1", "w2", "w3", "Physics"] for i in range(400))
    return path


def test_the_gold_letter_names_the_right_option_in_the_question_as_asked(table):
    for problem in Dataset(name="gpqa", path=table.parent).problems():
        right = f"right{problem.question[1:].splitlines()[0]}"
        assert problem.choices["ABCD".index(problem.answer)] == right
        assert problem.question.endswith("\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", problem.choices)))
        assert problem.stratum == "Physics"


def test_the_order_of_options_depends_on_the_seed_and_the_problem_alone(table):
    all_of_them = Dataset(name="gpqa", path=table).problems()
    assert Dataset(name="gpqa", path=table, limit=3).problems() == all_of_them[:3]
    assert Dataset(name="gpqa", path=table, seed=1).problems() != all_of_them
    letters = Counter(problem.answer for problem in all_of_them)
    assert min(letters[letter] for letter in "ABCD") > 60  # 100 each is expected


def test_a_row_without_its_options_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("Question,Correct Answer,Incorrect Answer 1\nq,r,w\n")
    with pytest.raises(DataError, match="line 2: Incorrect Answer 2: missing"):
        Dataset(name="gpqa", path=path).problems()
