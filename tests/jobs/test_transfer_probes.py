"""The transfer job on two small made-up experiments."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from jobs.transfer_probes import Config, TransferProbes
from tests.jobs.calibrated import calibrate, experiment
from tests.resume import assert_resume_is_exact
from tribunal.cluster.launch import run
from tribunal.core.errors import ConfigError, InputMissing
from tribunal.core.reports import read_report
from tribunal.probes.transfer import Kind, Matrix


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Results of two experiments."""
    folder = tmp_path_factory.mktemp("calibrated")
    calibrate(folder / "made")
    calibrate(folder / "more", seed=1)
    return folder


@pytest.fixture
def make(made):
    def job(root: Path, **changes) -> TransferProbes:
        if not (root / "results").exists():
            shutil.copytree(made, root / "results")
        settings = {"others": ["more"], "permutations": 5, "bootstrap": 100, **changes}
        return TransferProbes(experiment("transfer_probes", Config(**settings)))

    return job


def test_stopped_after_any_row_and_resumed_it_ends_with_the_same_digest(make, tmp_path, monkeypatch):
    assert_resume_is_exact(make, tmp_path, monkeypatch, points=3)
    report = read_report(tmp_path / "undisturbed" / "results" / "made" / "transfer_probes" / "report.json")
    names = {row.name for row in report.rows}
    assert {"experiment, trained on made, tested on more", "experiment, trained on more, tested on made"} <= names
    assert report.details["experiments"]["more"]["problems_shared"] == 30
    assert "Between experiments (made, more) the probe" in report.verdict


def test_strata_of_like_names_have_parts_of_their_own(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    kinds = [Kind(name, None, 1, "mean", name) for name in ("a b", "a-b", "a/b", "b" * 300)]
    monkeypatch.setattr(TransferProbes, "plan", lambda self: [(Matrix("difficulty", kinds), kind) for kind in kinds])
    parts = []

    def fit_row(matrix, kind, part):
        part.write_bytes(b"")
        parts.append(part.name)
        return {"file": part.name}

    job = make(tmp_path)
    job.__dict__["transfer"] = SimpleNamespace(fit_row=fit_row)
    monkeypatch.setattr(TransferProbes, "publish", lambda self, out: None)
    run(job, quiet=True)
    assert len(set(parts)) == len(kinds)


def test_another_experiment_that_is_missing_unfinished_or_this_one_is_refused_in_one_line(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no results of 'mor' .*; under results/ there is made, more") as error:
        make(tmp_path, others=["mor"]).check()
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="'made' is this experiment"):
        make(tmp_path, others=[str(tmp_path / "results" / "made")]).check()
    (tmp_path / "results" / "more" / "label_traces" / "receipt.json").unlink()
    with pytest.raises(InputMissing, match="label_traces, which has not finished for experiment 'more'"):
        make(tmp_path).check()
    with pytest.raises(ValidationError, match="two experiments of the same name"):
        Config(others=["more", "elsewhere/more"])


def test_a_change_in_the_other_experiment_is_a_changed_input(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    inputs = make(tmp_path).fingerprint()["inputs"]
    assert {"../more/generate_traces", "../more/label_traces", "../more/extract_activations", "train_probes"} <= set(inputs)
    assert inputs["../more/extract_activations"] != inputs["extract_activations"]
