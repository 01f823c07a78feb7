"""The steering job on the shipped reasoner: exact resume, and what its report says."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.steer import Steer
from tests.calibrated import Calibrated
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.core.errors import ConfigError
from tribunal.core.receipts import read_receipt
from tribunal.core.reports import read_report
from tribunal.core.storage import read_jsonl
from tribunal.probes.steering import SteeredTrace

SMALL = [
    f"steer.{pair}"
    for pair in (
        "traces_per_class=2", "strengths=[0.3]", "start=[middle]", "project_out=false", "adaptive_strengths=[]", "slots=16",
        "wave_size=40", "bootstrap=100", "calibration_traces=4",
    )
]  # fmt: skip


def test_stopped_at_any_look_and_resumed_it_ends_with_the_same_digest(calibrated: Calibrated, tmp_path, monkeypatch):
    assert_resume_is_exact(lambda folder: calibrated.job("steer", folder, *SMALL), tmp_path, monkeypatch, points=4)


def test_two_shards_give_the_same_digest_as_one(calibrated: Calibrated, tmp_path, monkeypatch):
    digests = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        monkeypatch.setenv("TRIBUNAL_ROOT", str(folder))
        experiment = calibrated.job("steer", folder, *SMALL).experiment
        codes = [run(Steer(experiment, Shard(index, count)), quiet=True) for index in range(count)]
        assert codes[-1] == FINISHED and all(code in (FINISHED, CONTINUE) for code in codes)
        digests.append(read_receipt(folder / "results/small/steer")["digest"])
    assert digests[0] == digests[1]


def test_the_report_stands_on_its_attempts_and_beside_its_controls(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    more = ["steer.traces_per_class=6", "steer.start=[prompt,middle]", "steer.project_out=true", "steer.adaptive_strengths=[0.3]"]
    more += ["steer.slots=256", "steer.wave_size=1024"]
    undisturbed(lambda: calibrated.job("steer", tmp_path, *SMALL, *more))
    folder = tmp_path / "results/small/steer"
    report, attempts = read_report(folder / "report.json"), read_jsonl(folder / "steering.jsonl", SteeredTrace)
    assert "planted" in report.verdict and "random" in report.verdict
    assert report.figures == ["steering.png"] and (folder / "steering.png").stat().st_size > 20_000
    row = next(row for row in report.rows if row.name.startswith("probe -0.3") and row.name.endswith("from the middle"))

    def right(direction: str, strength: float, was: str) -> float:
        ours = [a for a in attempts if (a.start, a.direction, a.strength, a.was) == ("middle", direction, strength, was)]
        assert len(ours) == 6 * (20 if direction == "random" else 1)
        return float(np.mean([a.verdict == "correct" for a in ours if a.action != "adaptive"]))

    controls = {control.name: control.value for control in row.controls}
    assert (row.metric, row.n) == ("recovery", 6)
    assert row.value == pytest.approx(right("probe", -0.3, "incorrect"), abs=1e-5)
    assert controls["no_steering"] == pytest.approx(right("none", 0.0, "incorrect"), abs=1e-5)
    assert controls["diff_of_means"] == pytest.approx(right("diff_of_means", -0.3, "incorrect"), abs=1e-5)
    assert set(controls) == {"no_steering", "random_directions", "diff_of_means"}
    assert all(a.kept_tokens > 0 for a in attempts if a.start == "middle") and not any(a.continued for a in attempts)
    traces = {(a.problem_id, a.sample, a.was) for a in attempts}
    assert len(traces) == 12


def test_layers_that_the_model_does_not_have_are_refused(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match="steer: no layer 3; builtin:addition has 3 layers, 0 to 2"):
        calibrated.job("steer", tmp_path, "steer.upstream_layers=[3]").check()
    with pytest.raises(ConfigError, match=r"strengths must be above 0.*\(got \[0.3, -1\]\)"):
        calibrated.experiment("steer.strengths=[0.3,-1]")
