"""The job: any number of shards and stops give the same bytes, and bad input is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.extract_activations import Config, ExtractActivations
from tests.resume import assert_resume_is_exact
from tests.tiny_models import tiny_folder
from tests.tiny_traces import make_pairs
from tribunal.activations.extraction import Extractor
from tribunal.activations.store import ActivationSet
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import FINISHED, run
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, SlurmConfig, load_experiment
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.receipts import digest, hash_outputs, read_receipt
from tribunal.core.storage import write_json, write_jsonl
from tribunal.core.work import Never
from tribunal.models.loading import load_model

PAIRS = make_pairs(13)
KEPT = [pair for pair in PAIRS if pair[1].verdict == "correct"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3", layers=4)


def finish(folder: Path, **files) -> None:
    """A finished job's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    outputs = hash_outputs(folder)
    write_json(folder / "receipt.json", {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})


def make_job(root: Path, model_folder: Path, shard: Shard | None = None, pairs=PAIRS, **config) -> ExtractActivations:
    if not (root / "results").exists():
        finish(root / "results/tiny/generate_traces", traces=[trace for trace, _ in pairs])
        finish(root / "results/tiny/label_traces", labels=[label for _, label in pairs])
    experiment = Experiment(
        name="tiny",
        path=Path("tiny.yaml"),
        seed=0,
        model=ModelConfig(name=str(model_folder), dtype="float32", device="cpu"),
        dataset=DatasetConfig(name="none"),
        slurm=SlurmConfig(),
        sections={
            "extract_activations": Config(
                **{"traces_per_shard": 2, "poolings": ["mean", "sentence", "think_end"], "verdicts": ["correct"], **config}
            )
        },
        given=frozenset(),
    )
    return ExtractActivations(experiment, shard)


def test_a_stop_between_any_two_shards_changes_no_byte(tmp_path, monkeypatch, model_folder):
    assert_resume_is_exact(lambda root: make_job(root, model_folder), tmp_path, monkeypatch, points=4)


def test_any_number_of_tasks_gives_the_same_results_merged_by_the_last(tmp_path, monkeypatch, model_folder):
    receipts = []
    for count in (1, 3):
        root = tmp_path / str(count)
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root))
        for index in reversed(range(count)):
            job = make_job(root, model_folder, Shard(index, count))
            assert not job.results.exists()
            assert run(job, quiet=True) == FINISHED
        receipts.append(read_receipt(job.results))
    assert receipts[0]["digest"] == receipts[1]["digest"]
    assert receipts[1]["notes"]["oom_halvings"] == 0


def test_the_published_set_holds_each_traces_rows_and_says_what_is_absent(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = make_job(tmp_path, model_folder, layers=[2], store_dtype="float32")
    run(job, quiet=True)
    found = ActivationSet.open(job.results)
    assert found.layers == [0, 2] and found.poolings == ["mean", "sentence", "think_end"]
    expected = Extractor(load_model(job.experiment.model).model, layers=[2], poolings=found.poolings, store_dtype="float32").extract(KEPT)
    for (layer, pooling), rows in expected.items():
        torch.testing.assert_close(found.read(layer, pooling), rows, rtol=0, atol=2e-5)
    assert [row.key for row in found.rows("mean")] == [trace.key for trace, _ in KEPT]
    sentences = [(label.key, n, s.end_token - 1, s.end_token) for _, label in KEPT for n, s in enumerate(label.sentences)]
    assert [(row.key, row.position, row.start_token, row.end_token) for row in found.rows("sentence")] == sentences
    assert found.meta.absent["think_end"] == len(KEPT) - len(found.rows("think_end")) > 0
    assert found.meta.model["d_model"] == 32 and found.meta.hook_points == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def test_publishing_twice_gives_the_same_files(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = make_job(tmp_path, model_folder)
    job.build().run(Never())
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        job.publish(tmp_path / name)
    assert hash_outputs(tmp_path / "first") == hash_outputs(tmp_path / "second")


def test_a_layer_out_of_range_is_refused_before_any_work(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tiny.yaml: extract_activations.layers: no layer 4; .* has 4 layers, 0 to 3"):
        make_job(tmp_path, model_folder, layers=[1, 4]).check()


def test_an_unknown_pooling_is_refused_with_the_nearest_name(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        "name: e\nmodel: {name: builtin:addition}\ndataset: {name: addition}\nextract_activations: {poolings: [mean, last_ten]}"
    )
    with pytest.raises(ConfigError, match=r"extract_activations.poolings: unknown pooling 'last_ten'; did you mean 'last_10'"):
        load_experiment(path)


def test_labels_that_do_not_fit_the_traces_are_refused(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    job = make_job(tmp_path, model_folder)
    finish(tmp_path / "results/tiny/label_traces", labels=[label for _, label in PAIRS[:-1]])
    with pytest.raises(DataError, match=r"no label for trace p6/0"):
        job.build()
    finish(tmp_path / "results/tiny/label_traces", labels=[label for _, label in [*PAIRS, *make_pairs(15)[-1:]]])
    with pytest.raises(DataError, match=r"1 labels without a trace in .*, first p7/0"):
        job.build()


def test_no_trace_with_a_wanted_verdict_is_refused_with_the_counts(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    with pytest.raises(DataError, match=r"no trace with verdict truncated \(correct \d+, incorrect \d+\)"):
        make_job(tmp_path, model_folder, verdicts=["truncated"]).build()
