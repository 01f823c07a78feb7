from __future__ import annotations

import json

import pytest

from tribunal.core.errors import DataError, UserError
from tribunal.datasets.answers import grade
from tribunal.datasets.bbh import Dataset


def test_the_six_real_tasks_are_multiple_choice_and_their_golds_grade_as_right(shared_data):
    for path in sorted((shared_data / "bbh").glob("*.json")):
        problems = Dataset(name="bbh", path=shared_data / "bbh", task=path.stem, skip_faulty=True).problems()
        assert len(problems) in (146, 249, 250)
        for problem in problems:
            gold = problem.choices["ABCDEFGHIJKLMNOP".index(problem.answer)]
            assert f"({problem.answer}) {gold}" in problem.question
            for response in (f"The answer is ({problem.answer}).", f"So the answer is {gold}.", f"\\boxed{{\\text{{{problem.answer}}}}}"):
                assert grade(response, problem.answer, problem.choices).verdict == "correct", (problem.id, response)
            wrong = "B" if problem.answer == "A" else "A"
            assert grade(f"The answer is ({wrong}).", problem.answer, problem.choices).verdict == "incorrect"


def test_a_target_that_is_no_option_is_refused_unless_such_rows_are_to_be_left_out(shared_data):
    path = shared_data / "bbh" / "movie_recommendation.json"
    with pytest.raises(DataError, match=r"example 164: target: 'Monsters, Inc'.*skip_faulty"):
        Dataset(name="bbh", path=path).problems()


def test_other_tasks_keep_their_target_as_text(tmp_path):
    path = tmp_path / "boolean_expressions.json"
    path.write_text(
        json.dumps({"examples": [{"input": "not ( True ) is", "target": "False"}, {"input": "Options:\n- Yes\n- No", "target": "No"}]})
    )
    problems = Dataset(name="bbh", path=path).problems()
    assert [(problem.answer, problem.choices, problem.dataset) for problem in problems] == [
        ("False", None, "bbh/boolean_expressions"),
        ("No", None, "bbh/boolean_expressions"),
    ]


def test_without_a_task_the_known_ones_are_listed(tmp_path):
    (tmp_path / "snarks.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset\.task: missing.*snarks"):
        Dataset(name="bbh", path=tmp_path).problems()
    with pytest.raises(UserError, match=r"dataset\.revision: missing"):
        Dataset(name="bbh", task="snarks").problems()
