"""Units that ended the process twice are left out of every job's results, and everything after goes on without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tribunal.cluster.launch import FINISHED, make_job, run
from tribunal.cluster.ledger import Ledger
from tribunal.core.config import load_experiment
from tribunal.core.errors import DataError
from tribunal.core.receipts import read_receipt
from tribunal.core.records import Report
from tribunal.core.reports import read_report
from tribunal.core.storage import Journal

EXPERIMENT = """
name: poisoned
model: {name: "builtin:addition", dtype: float32}
dataset: {name: addition, digits: [2, 3], per_digits: 15}
generate_traces: {samples_per_problem: 4, max_new_tokens: 120, slots: 4, wave_size: 4}
label_traces: {min_per_class: 2}
extract_activations: {layers: [2], poolings: [mean], traces_per_shard: 8, store_dtype: float32}
train_probes: {folds: 3, permutations: 10, bootstrap: 100, random_directions: 2, min_per_class: 2}
select_answers: {bootstrap: 100}
monitor_traces: {bootstrap: 100, percents: [50], positions: [5]}
steer:
  {traces_per_class: 1, strengths: [0.3], start: [middle], project_out: false, adaptive_strengths: [], bootstrap: 100,
   calibration_traces: 4}
attribute_direction: {traces: 40, random_sets: 2, problems: 2, samples: 1, bootstrap: 100}
transfer_probes: {permutations: 2, bootstrap: 100}
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    (tmp_path / "poisoned.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "poisoned.yaml")


def finish(job, poison: list[str]) -> dict:
    """Run a job to its end after two generations that died on the same units; returns its receipt, which names them."""
    job.state.mkdir(parents=True, exist_ok=True)
    for epoch in (-2, -1):
        ledger = Ledger(job.state / "generations.jsonl")
        ledger.start(str(job.shard), epoch)
        ledger.end(str(job.shard), epoch, cause="crashed", seconds=1.0, units=0, error="killed", in_flight=poison, mendable=False)
    assert run(job, quiet=True) == FINISHED
    receipt = read_receipt(job.results)
    assert receipt is not None and receipt["set_aside"] == sorted(poison)
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
    finish(make_job("generate_traces", experiment), wave)
    traces = [f"{trace['problem_id']}/{trace['sample']}" for trace in lines(results / "generate_traces/traces.jsonl")]
    assert len(traces) == 116 and not set(wave) & set(traces)

    finish(make_job("label_traces", experiment), traces[:1])
    labels = lines(results / "label_traces/labels.jsonl")
    assert len(labels) == 116 and labels[0]["verdict"] == "unparsable" and labels[0]["answer"] is None

    finish(make_job("extract_activations", experiment), ["acts-00001"])
    rows = lines(results / "extract_activations/index.jsonl")
    extracted = {(row["problem_id"], row["sample"]) for row in rows}
    labelled = [label for label in labels if label["verdict"] in ("correct", "incorrect")]
    assert len(extracted) == len(labelled) - 8
    assert {(label["problem_id"], label["sample"]) for label in labelled[8:16]}.isdisjoint(extracted)

    finish(make_job("train_probes", experiment), ["layer_0/mean"])
    report = json.loads((results / "train_probes/report.json").read_text())
    assert report["rows"][0]["n"] == len(extracted)
    assert report["details"]["counts"]["not_extracted"] == 8

    for name in ("select_answers", "monitor_traces", "steer", "attribute_direction", "transfer_probes"):
        assert run(make_job(name, experiment), quiet=True) == FINISHED, name


SMALL = {
    "select_answers": ["chunk=1", "bootstrap=100"],
    "monitor_traces": ["traces_per_shard=64", "bootstrap=100", "percents=[50]", "positions=[5]"],
    "steer": [
        "traces_per_class=2", "strengths=[0.3]", "start=[middle]", "project_out=false", "adaptive_strengths=[]", "slots=16", "wave_size=24",
        "bootstrap=100", "calibration_traces=4",
    ],
    "attribute_direction": ["traces=130", "random_sets=2", "problems=2", "samples=1", "slots=4", "bootstrap=100"],
    "transfer_probes": ["permutations=2", "bootstrap=100"],
    "label_sentences": ["samples_per_problem=1", "importance=none"],
    "train_oracle": [
        "tasks=[carry,random_bit]", "lora={rank: 2, alpha: 4, dropout: 0.1}", "batch_size=8", "steps=4", "text_only_steps=2",
        "validate_every=2", "validate_items=8", "keep=2", "audit={min_per_split: 5}", "max_new_tokens=4",
    ],
    "evaluate_oracle": ["items_per_task=4", "chunk=2", "bootstrap=100"],
}  # fmt: skip
OVERRIDES = [f"{name}.{value}" for name, values in SMALL.items() for value in values]
"""Of the later phases, whose reports say what is missing; where that would mislead the job refuses to publish."""


@pytest.fixture
def job(calibrated, tmp_path, monkeypatch):
    """``job(name, override...)`` on a copy of a whole calibration."""
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return lambda name, *overrides: calibrated.job(name, tmp_path, *OVERRIDES, *overrides)


def published(made) -> tuple[Report, str]:
    report = read_report(made.results / "report.json")
    return report, " ".join(report.not_supported)


def test_a_problem_without_a_choice_is_left_out_of_the_selection(job):
    made = job("select_answers")
    lost = made.candidates.problems[3]
    finish(made, [lost])
    report, missing = published(made)
    assert "Every problem: 1 ended the process and were set aside." in missing
    assert report.rows[0].n == len(made.candidates.problems) - 1


def test_a_shard_that_was_not_monitored_is_left_out_of_every_curve(job):
    made = job("monitor_traces")
    lost = made.signals.shards[1]
    finish(made, [made.signals.key(lost)])
    _, missing = published(made)
    assert "64 traces whose shard ended the process twice" in missing
    keys = [f"{line['problem_id']}/{line['sample']}" for line in lines(made.results / "monitor.jsonl")]
    assert len(keys) == 240 - 64 and not {made.signals.traces.key(number) for number in lost} & set(keys)


def test_steering_leaves_out_the_conditions_of_a_wave_and_refuses_without_its_base_line(job):
    made = job("steer")
    waves = [[attempt.key for attempt in wave] for wave in made.steering.waves()]
    finish(made, waves[-1])
    report, missing = published(made)
    assert report.details["set_aside"] == len(waves[-1])
    conditions = {attempt.condition.key for attempt in made.steering.waves()[-1]}
    assert f"Anything under {len(conditions)} conditions: completions under them ended the process and were set aside." in missing
    assert len(lines(made.results / "steering.jsonl")) == sum(map(len, waves[:-1]))
    shutil.rmtree(made.results)
    with pytest.raises(DataError, match=r"^steer: attempts without steering ended the process and were set aside; .*$"):
        finish(job("steer"), waves[0])


def test_attribution_goes_on_without_some_of_its_reading(job):
    made = job("attribute_direction")
    measured, reading = ~made.material.ranking, [item for item in made.material.plan() if item.kind == "writes"]
    finish(made, reading[0].keys)
    report, missing = published(made)
    assert "Every trace and answer: 1 units ended the process and were set aside." in missing
    assert report.rows[0].n == measured.sum() - measured[made.material.shard(0)].sum() < measured.sum()


def test_a_row_of_the_transfer_matrix_without_a_fit_is_named(job):
    made = job("transfer_probes")
    matrix, kind = made.plan()[1]
    finish(made, [matrix.key(kind)])
    report, missing = published(made)
    assert f"Transfer from {kind.name} ({matrix.axis}): its fit ended the process and was set aside." in missing
    assert not [row for row in report.rows if row.name.startswith(f"{matrix.axis}, trained on {kind.name},")]


def test_a_trace_without_sentence_labels_is_left_out_and_the_audit_names_it(job):
    made = job("label_sentences")
    labels = lines(made.results_of("label_traces") / "labels.jsonl")
    key = next(f"{label['problem_id']}/{label['sample']}" for label in labels if label["verdict"] == "incorrect" and label["sample"] == 0)
    finish(made, [key])
    assert json.loads((made.results / "audit.json").read_text())["set_aside"] == [key]
    labelled = {f"{line['problem_id']}/{line['sample']}" for line in lines(made.results / "sentences.jsonl")}
    assert len(labelled) == 59 and key not in labelled


def test_an_oracle_is_judged_without_another_adapter_which_is_named_but_not_without_a_control(job):
    trained = job("train_oracle")
    assert run(trained, quiet=True) == FINISHED
    theirs = trained.results / "text_only"
    made = job("evaluate_oracle", f"evaluate_oracle.published=[{theirs}]")
    plan = made.evaluation.plan()
    earlier = next(unit for unit in plan if unit.who.step is not None)
    lent = [unit for unit in plan if unit.who.adapter is not None and unit.condition == "zeroed" and unit.chunk == 0]
    finish(made, [earlier.key, *(unit.key for unit in lent)])
    report, missing = published(made)
    named = ", ".join([f"step {earlier.who.step} on {earlier.task}", *(f"adapter {theirs} on {unit.task}" for unit in lent)])
    assert len(lent) == 2 and f"Anything about {named}: answers ended the process and were set aside." in missing
    assert not [row for row in report.rows if row.name.startswith(f"{earlier.task}, ") and row.name.endswith(f"step {earlier.who.step}")]
    assert [row for row in report.rows if row.name.endswith(f"step {earlier.who.step}")], "the other task's answers stay"
    shutil.rmtree(made.results)
    control = next(unit for unit in plan if unit.condition == "shuffled")
    with pytest.raises(DataError, match=f"^evaluate_oracle: the answers of shuffled to {control.task} ended the process .* reported$"):
        finish(job("evaluate_oracle"), [control.key])
