"""The selection job on a small made-up experiment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.select_answers import Config, SelectAnswers
from tests.jobs.calibrated import calibrate, experiment
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.core.receipts import read_receipt
from tribunal.core.reports import read_report


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "made"
    calibrate(folder)
    return folder


@pytest.fixture
def make(made):
    def job(root: Path, shard: Shard | None = None, **changes) -> SelectAnswers:
        if not (root / "results" / "made").exists():
            shutil.copytree(made, root / "results" / "made")
        return SelectAnswers(experiment("select_answers", Config(**{"bootstrap": 100, "chunk": 8, **changes})), shard)

    return job


def test_stopped_after_any_chunk_and_resumed_it_ends_with_the_same_digest(make, tmp_path, monkeypatch):
    assert_resume_is_exact(make, tmp_path, monkeypatch, points=4)


def test_shards_and_chunks_do_not_change_the_digest(make, tmp_path, monkeypatch):
    digests = []
    for count, chunk in ((1, 30), (2, 4)):
        root = tmp_path / str(count)
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root))
        codes = [run(make(root, Shard(index, count), chunk=chunk), quiet=True) for index in range(count)]
        assert codes[-1] == FINISHED and all(code in (FINISHED, CONTINUE) for code in codes)
        digests.append(read_receipt(root / "results" / "made" / "select_answers")["digest"])
    assert digests[0] == digests[1]


def test_the_report_has_every_selector_and_the_probe_beats_a_log_probability_that_is_noise(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    receipt, _ = undisturbed(lambda: make(tmp_path))
    assert set(receipt["outputs"]) == {"report.json", "selection.png"}
    report = read_report(tmp_path / "results" / "made" / "select_answers" / "report.json")
    assert [control.name for control in report.rows[0].controls] == ["random_choice", "majority_vote", "logprob", "length", "best_possible"]
    gains = {"logprob": report.rows[0].value - next(c.value for c in report.rows[0].controls if c.name == "logprob")}
    assert gains["logprob"] > 0.1
    assert report.details["samples_without_an_answer"] == 1 and report.details["mcnemar"]["tests"]
    assert {row.stratum for row in report.rows} == {None, "2 digits", "3 digits"}
