from __future__ import annotations

import json

import pytest

from tribunal.core.errors import DataError, UserError
from tribunal.datasets.jsonl import Dataset


def read(tmp_path, *rows, **keys):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(name="jsonl", path=path, **keys).problems()


def test_questions_choices_and_continuations_are_read(tmp_path):
    plain, choice, shown, text = read(
        tmp_path,
        {"question": "3+4?", "answer": 7, "id": "seven", "stratum": "easy", "source": "mine"},
        {"question": "Which?", "answer": "two", "choices": ["one", "two"]},
        {"question": "Which?\n(A) one\n(B) two", "answer": "(a)", "choices": ["one", "two"]},
        {"prefix": "The capital of France is ", "suffix": " Paris"},
    )
    assert (plain.id, plain.answer, plain.stratum, plain.kind) == ("seven", "7", "easy", "question")
    assert (choice.answer, choice.question) == ("B", "Which?\n\n(A) one\n(B) two")
    assert (shown.answer, shown.question) == ("A", "Which?\n(A) one\n(B) two")
    assert (text.kind, text.question, text.answer) == ("continuation", "The capital of France is ", "Paris")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "answer: missing"),
        ({"prefix": "p"}, "suffix: missing"),
        ({"question": "q", "anser": "7"}, "unknown field 'anser'; did you mean 'answer'"),
        ({"question": "q", "answer": "C", "choices": ["x", "y"]}, "'C' is none of the choices"),
        ({"question": "q", "answer": "x", "choices": "xy"}, "choices: expected a list"),
        ({"question": "q", "answer": "x", "choices": ["x", "x"]}, "doubled"),
        ({"question": "q", "answer": "7", "id": "one"}, "id: 'one' was used already at .*line 1"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path, row, message):
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read(tmp_path, {"question": "q", "answer": "7", "id": "one"}, row)


def test_a_path_is_needed():
    with pytest.raises(UserError, match=r"dataset\.path: missing"):
        Dataset(name="jsonl").problems()
