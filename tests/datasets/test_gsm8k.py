from __future__ import annotations

from tribunal.datasets.gsm8k import Dataset


def test_the_real_files_are_read_whole(shared_data):
    test = Dataset(name="gsm8k", path=shared_data / "gsm8k").problems()
    train = Dataset(name="gsm8k", path=shared_data / "gsm8k" / "train.jsonl").problems()
    assert (len(test), len(train)) == (1319, 7473)
    assert test[0].answer == "18" and test[0].question.startswith("Janet") and test[0].stratum == "1-2 steps"
    assert all("####" not in problem.answer and "," not in problem.answer for problem in test + train)
    assert Dataset(name="gsm8k", path=shared_data / "gsm8k", limit=3).problems() == test[:3]
