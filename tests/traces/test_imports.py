from __future__ import annotations

import json

import pytest

from tests.traces.helpers import problem
from tribunal.core.errors import DataError
from tribunal.traces.imports import ImportedTrace, read_imported

PROBLEMS = [problem("one"), problem("two"), problem("three"), problem("twin").model_copy(update={"question": "question three"})]


def read(tmp_path, *rows):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_imported(path, PROBLEMS)


def test_rows_find_their_problem_by_id_or_question_and_are_numbered_in_order(tmp_path):
    assert read(
        tmp_path,
        {"problem_id": "one", "completion": " 18 "},
        {"question": "question  two", "completion": "x", "finish_reason": "length", "model": "elsewhere"},
        {"problem_id": "one", "completion_ids": [5, 6]},
        {"problem_id": "one", "completion": "y", "sample": 7},
    ) == [
        ImportedTrace("one", 0, " 18 ", None, "stop"),
        ImportedTrace("two", 0, "x", None, "length"),
        ImportedTrace("one", 1, None, [5, 6], "stop"),
        ImportedTrace("one", 7, "y", None, "stop"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "x"}, "question: missing"),
        ({"problem_id": "ones", "completion": "x"}, "no problem 'ones' in the dataset; did you mean 'one'"),
        ({"question": "question three", "completion": "x"}, "2 problems ask"),
        ({"question": "question four", "completion": "x"}, "no problem of the dataset asks"),
        ({"problem_id": "one"}, "completion: missing"),
        ({"problem_id": "one", "completion_ids": ["a"]}, "completion_ids: expected a list of token ids"),
        ({"problem_id": "one", "completion": "x", "sample": 0}, "sample: 0 of problem 'one' is there already at .*line 1"),
        ({"problem_id": "one", "completion": "x", "sample": -1}, "-1 is not a whole number"),
        ({"problem_id": "one", "completion": "x", "finish_reason": "eos"}, "'eos' is neither 'stop' nor 'length'"),
        ({"problem_id": "one", "completion": "x", "finish_reson": "length"}, "unknown field 'finish_reson'"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path, row, message):
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read(tmp_path, {"problem_id": "one", "completion": "x"}, row)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_imported(tmp_path / "none.jsonl", PROBLEMS)
