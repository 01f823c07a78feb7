"""The probe job on a small made-up experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.train_probes import Config, TrainProbes
from tests.probes.helpers import make_world
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, SlurmConfig
from tribunal.core.errors import CorruptError, LabelError
from tribunal.core.receipts import RECEIPT, digest, hash_outputs, read_receipt
from tribunal.core.storage import write_json
from tribunal.core.work import Never
from tribunal.probes.collect import collect
from tribunal.probes.direction import load
from tribunal.probes.held_out import read_held_out

SETTINGS = {
    "folds": 3,
    "c": [0.01, 1.0],
    "permutations": 10,
    "random_directions": 5,
    "bootstrap": 100,
    "kinds": ["logistic", "diff_of_means"],
}


def make(root: Path, shard: Shard | None = None, **changes) -> TrainProbes:
    results = root / "results" / "made"
    if not results.exists():
        make_world(results, problems=30, poolings=["mean"])
        for folder in results.iterdir():
            outputs = hash_outputs(folder)
            write_json(folder / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})
    experiment = Experiment(
        name="made",
        path=Path("made.yaml"),
        seed=0,
        model=ModelConfig(name="tiny"),
        dataset=DatasetConfig(name="made"),
        slurm=SlurmConfig(),
        sections={"train_probes": Config(**{**SETTINGS, **changes})},
        given=frozenset(),
    )
    return TrainProbes(experiment, shard)


def test_stopped_after_any_unit_and_resumed_it_ends_with_the_same_digest(tmp_path, monkeypatch):
    assert_resume_is_exact(make, tmp_path, monkeypatch)


def test_it_writes_report_directions_and_figure_and_collect_takes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    receipt, _ = undisturbed(lambda: make(tmp_path))
    files = {"report.json", "implicit_value_directions.json", "held_out.jsonl", "fold_directions.json", "probe_results.png"}
    assert set(receipt["outputs"]) == files
    folder = tmp_path / "results" / "made" / "train_probes"
    assert load(folder).experiment == read_held_out(folder).file.experiment == "made"
    collection = collect([tmp_path / "results"])
    assert len(collection.rows) == 4 and not collection.refused


def test_two_shards_give_the_same_digest_as_one(tmp_path, monkeypatch):
    digests = []
    for count in (1, 2):
        monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / str(count)))
        codes = [run(make(tmp_path / str(count), Shard(index, count)), quiet=True) for index in range(count)]
        assert codes[-1] == FINISHED and all(code in (FINISHED, CONTINUE) for code in codes)
        digests.append(read_receipt(tmp_path / str(count) / "results" / "made" / "train_probes")["digest"])
    assert digests[0] == digests[1]


def test_too_few_traces_of_a_class_are_refused_before_any_unit(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(LabelError, match="at least 100 of each are needed"):
        make(tmp_path, min_per_class=100).build()


def test_a_damaged_part_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = make(tmp_path)
    assert job.build().run(stop=Never())
    part = next(job.parts.glob("layer_1*"))
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptError, match=str(part)):
        make(tmp_path).publish(tmp_path / "out")
