"""Units that ended the process twice are left out of every job's results, and everything after goes on without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tribunal.cluster.launch import FINISHED, make_job, run
from tribunal.cluster.ledger import Ledger
from tribunal.core.config import load_experiment
from tribunal.core.receipts import read_receipt
from tribunal.core.storage import Journal

EXPERIMENT = """
name: poisoned
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 15}
generate_traces: {samples_per_problem: 4, max_new_tokens: 120, slots: 4, wave_size: 4}
label_traces: {min_per_class: 2}
extract_activations: {layers: [2], poolings: [mean], traces_per_shard: 8, store_dtype: float32}
train_probes: {folds: 3, permutations: 10, bootstrap: 100, random_directions: 2, min_per_class: 2}
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    (tmp_path / "poisoned.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "poisoned.yaml")


def finish(experiment, name: str, poison: list[str]) -> dict:
    """Run a job to its end after two generations that died on the same units."""
    job = make_job(name, experiment)
    job.state.mkdir(parents=True, exist_ok=True)
    for epoch in (-2, -1):
        ledger = Ledger(job.state / "generations.jsonl")
        ledger.start(str(job.shard), epoch)
        ledger.end(str(job.shard), epoch, cause="crashed", seconds=1.0, units=0, error="killed", in_flight=poison, mendable=False)
    assert run(job, quiet=True) == FINISHED
    receipt = read_receipt(job.results)
    assert receipt is not None
    return receipt


def test_the_note_of_what_was_being_worked_on_leaves_out_what_is_recorded(experiment, monkeypatch):
    job = make_job("generate_traces", experiment)
    append, seen = Journal.append, []

    def fail_after_a_few(journal, records):
        append(journal, records)
        seen.extend(records)
        if len(seen) > 5:
            raise RuntimeError("device lost")

    monkeypatch.setattr(Journal, "append", fail_after_a_few)
    with pytest.raises(RuntimeError):
        run(job, quiet=True)
    row = Ledger(job.state / "generations.jsonl").generations()[-1]
    wave = json.loads(job.attempts.read_text())["keys"]
    assert row["in_flight"] and set(row["in_flight"]) == set(wave) - set(seen) < set(wave)
    assert make_job("generate_traces", experiment).in_flight(row["epoch"]) == row["in_flight"], "its parent finds the same"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_poisoned_units_of_every_job_are_recorded_and_the_rest_goes_on(experiment, tmp_path):
    from tribunal.traces.sampling import plan, waves

    results = tmp_path / "results" / "poisoned"
    wave = [attempt.key for attempt in waves(plan(experiment.dataset.problems(), 4, 0, None), 4)[1]]
    assert finish(experiment, "generate_traces", wave)["set_aside"] == sorted(wave)
    traces = [f"{trace['problem_id']}/{trace['sample']}" for trace in lines(results / "generate_traces/traces.jsonl")]
    assert len(traces) == 116 and not set(wave) & set(traces)

    assert finish(experiment, "label_traces", traces[:1])["set_aside"] == traces[:1]
    labels = lines(results / "label_traces/labels.jsonl")
    assert len(labels) == 116 and labels[0]["verdict"] == "unparsable" and labels[0]["answer"] is None

    assert finish(experiment, "extract_activations", ["acts-00001"])["set_aside"] == ["acts-00001"]
    rows = lines(results / "extract_activations/index.jsonl")
    extracted = {(row["problem_id"], row["sample"]) for row in rows}
    labelled = [label for label in labels if label["verdict"] in ("correct", "incorrect")]
    assert len(extracted) == len(labelled) - 8
    assert {(label["problem_id"], label["sample"]) for label in labelled[8:16]}.isdisjoint(extracted)

    assert finish(experiment, "train_probes", ["layer_0/mean"])["set_aside"] == ["layer_0/mean"]
    report = json.loads((results / "train_probes/report.json").read_text())
    assert report["rows"][0]["n"] == len(extracted)
    assert report["details"]["counts"]["not_extracted"] == 8
