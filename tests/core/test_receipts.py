"""A finished job's results are used only while they belong to what it read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tribunal.core.errors import InputMissing
from tribunal.core.receipts import RECEIPT, require, stale
from tribunal.core.storage import write_json


def finish(root: Path, job: str, digest: str, **inputs: str) -> Path:
    folder = root / job
    folder.mkdir(exist_ok=True)
    write_json(folder / RECEIPT, {"schema_version": 1, "outputs": {}, "digest": digest, "config": {"inputs": inputs}})
    return folder


def test_results_whose_inputs_were_made_anew_are_refused_by_name_also_further_up(tmp_path):
    finish(tmp_path, "traces", "1")
    store = finish(tmp_path, "store", "2", traces="1")
    probes = finish(tmp_path, "probes", "3", store="2", gone="7")
    for folder in (store, probes):
        assert require(folder, "anyone")["digest"] in "23"
    finish(tmp_path, "traces", "1b")
    with pytest.raises(InputMissing, match=r"steer reads the results of store, which are stale \(traces changed since\); remove .*store"):
        require(store, "steer")
    with pytest.raises(InputMissing, match=r"results of probes, which are stale \(store is stale\)"):
        require(probes, "steer")


def test_jobs_that_read_each_other_are_looked_at_once():
    circle = {job: {"digest": job, "config": {"inputs": {other: other}}} for job, other in (("a", "b"), ("b", "a"))}
    assert stale("a", circle.get) == ""
