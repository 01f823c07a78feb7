from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.generate_traces import Config, GenerateTraces
from tests.power import CutAfter, Disk, PowerCut
from tests.resume import StopAfter, assert_resume_is_exact, undisturbed
from tests.tiny_models import tiny_folder
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import CONTINUE, FINISHED, run
from tribunal.core.config import Experiment, ModelConfig, SlurmConfig
from tribunal.core.errors import ConfigError, ModelError, UserError
from tribunal.core.receipts import read_receipt
from tribunal.core.records import Problem, Trace
from tribunal.core.storage import read_jsonl
from tribunal.datasets.addition import Dataset
from tribunal.models.reasoner import SEP, VOCABULARY
from tribunal.traces.labels import verdict_of

BUILTIN = ModelConfig(name="builtin:addition", dtype="float32", device="cpu")


def job(
    model: ModelConfig = BUILTIN, shard: Shard | None = None, *, name: str = "tiny", per_digits: int = 3, seed: int = 0, **config
) -> GenerateTraces:
    config = {"samples_per_problem": 2, "max_new_tokens": 100, "slots": 4, "wave_size": 8, **config}
    experiment = Experiment(
        name=name,
        path=Path("tiny.yaml"),
        seed=seed,
        model=model,
        dataset=Dataset(name="addition", digits=[2, 3], per_digits=per_digits),
        slurm=SlurmConfig(),
        sections={"generate_traces": Config(**config)},
        given=frozenset(),
    )
    return GenerateTraces(experiment, shard)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return tmp_path


def finish(made: GenerateTraces) -> tuple[list[Trace], dict]:
    assert run(made, quiet=True) == FINISHED
    return read_jsonl(made.results / "traces.jsonl", Trace), json.loads((made.results / "summary.json").read_text())


def test_traces_are_complete_records_of_every_attempt(root):
    made = job()
    traces, summary = finish(made)
    problems = read_jsonl(made.results / "problems.jsonl", Problem)
    assert len(traces) == 12 and len({trace.key for trace in traces}) == 12
    assert [trace.problem_id for trace in traces] == [problem.id for problem in problems for _ in range(2)]
    assert [problem.id for problem in problems] != [problem.id for problem in made.experiment.dataset.problems()]  # shuffled by the seed
    for trace in traces:
        assert len(trace.logprobs) == len(trace.completion_ids) and max(trace.logprobs) <= 0
        assert trace.completion_ids and trace.readable <= len(trace.completion_ids)
        assert trace.model.startswith("builtin:addition@folder:")
    assert summary["traces"] == summary["attempted"] == 12 and summary["warnings"] == []
    assert sum(summary["verdicts"].values()) == sum(summary["finish"].values()) == 12


def test_the_builtin_reasoner_is_often_right_and_its_self_report_is_left_out(root):
    made = job(per_digits=6)
    traces, summary = finish(made)
    assert summary["verdicts"]["correct"] >= 8
    separator = VOCABULARY.index(SEP)
    reported = [trace for trace in traces if separator in trace.completion_ids]
    assert len(reported) >= 18
    for trace in reported:
        assert trace.completion_ids.index(separator) == trace.readable
        assert trace.response.startswith("\nAnswer: ") and trace.response[-1].isdigit() and trace.thought.count("write") >= 2


def test_problems_and_samples_have_draws_of_their_own(root):
    traces, _ = finish(job())
    assert len({tuple(trace.completion_ids) for trace in traces}) > 10
    other, _ = finish(job(seed=1, name="other"))
    same = {trace.key: trace.completion_ids for trace in other}
    assert any(trace.completion_ids != same[trace.key] for trace in traces)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    assert_resume_is_exact(lambda _: job(per_digits=2), tmp_path, monkeypatch, points=8)


def test_a_stopped_run_with_targets_ends_with_the_same_bytes(tmp_path, monkeypatch):
    targets = {"target_correct": 3, "target_incorrect": 1, "per_digits": 6, "wave_size": 4}
    assert_resume_is_exact(lambda _: job(**targets), tmp_path, monkeypatch, points=5)


def test_a_kill_without_saved_state_ends_with_the_same_bytes(root, monkeypatch):
    receipt, _ = undisturbed(job)
    monkeypatch.setenv("TRIBUNAL_ROOT", str(root / "killed"))

    class Killed(BaseException):
        pass

    made, seen = job(), []
    append = made.journal.append

    def append_then_die(records):
        append(records)
        seen.extend(records)
        if len(seen) >= 5:
            raise Killed

    made.journal.append = append_then_die
    with pytest.raises(Killed):
        run(made, quiet=True)
    resumed = job()
    assert run(resumed, quiet=True) == FINISHED
    again = json.loads((resumed.results / "receipt.json").read_text())
    assert again["digest"] == receipt["digest"]


@pytest.mark.parametrize("generations", [1, 2])
def test_a_power_cut_loses_no_trace_that_a_saved_state_skips(root, monkeypatch, generations):
    """With two, the first is only killed, and the second's states skip traces that the first had not made durable."""
    receipt, looks = undisturbed(job)
    at_risk = 0
    for point in range(15, looks - 24, 30):
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root / str(point)))
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch)
            for last in (point, 22)[:generations]:
                with pytest.raises(PowerCut):
                    run(job(), stop=CutAfter(last, disk), quiet=True)
                at_risk += disk.not_durable(job().state / "journal")
            disk.cut(job().state / "journal")
        finish(job())
        again = read_receipt(job().results)
        assert again is not None and again["digest"] == receipt["digest"], f"cut after {point} of {looks} looks"
    assert at_risk > 0, "everything was always durable: nothing was tried"


@pytest.mark.parametrize("targets", [{}, {"target_correct": 4, "target_incorrect": 2}])
def test_bytes_do_not_depend_on_the_number_of_shards(root, monkeypatch, targets):
    digests = set()
    for count in (1, 2, 3):
        monkeypatch.setenv("TRIBUNAL_ROOT", str(root / str(count)))
        for index in reversed(range(count)):
            made = job(shard=Shard(index, count), per_digits=8, wave_size=6, **targets)
            assert run(made, quiet=True) == FINISHED
        digests.add(json.loads((made.results / "receipt.json").read_text())["digest"])
    assert len(digests) == 1


def test_targets_are_met_exactly_by_the_shortest_prefix_of_the_fixed_order(root):
    everything, _ = finish(job(per_digits=10))
    made = job(per_digits=10, target_correct=5, target_incorrect=3, name="targets")
    kept, summary = finish(made)
    problems = {problem.id: problem for problem in made.experiment.dataset.problems()}
    verdicts = [verdict_of(trace, problems[trace.problem_id])[0] for trace in everything]
    end = next(n for n in range(len(everything) + 1) if verdicts[:n].count("correct") >= 5 and verdicts[:n].count("incorrect") >= 3)
    left = {"correct": 5, "incorrect": 3, "unparsable": 99, "truncated": 99}
    expected = []
    for trace, verdict in zip(everything[:end], verdicts):
        if left[verdict] > 0:
            left[verdict] -= 1
            expected.append(trace)
    assert kept == expected and left["correct"] == left["incorrect"] == 0
    assert summary["attempted"] == end and summary["dropped"] == end - len(kept)


def test_targets_that_are_not_met_are_a_warning_with_counts(root):
    traces, summary = finish(job(per_digits=4, target_incorrect=12, max_attempts=14))
    assert summary["attempted"] == 14 and len(traces) == 14
    assert summary["warnings"][0].startswith(f"target_incorrect not met: {summary['verdicts']['incorrect']} of 12")


def test_a_cut_off_trace_is_truncated_and_never_incorrect(root):
    traces, summary = finish(job(max_new_tokens=5))
    assert summary["verdicts"] == {"correct": 0, "incorrect": 0, "unparsable": 0, "truncated": 12}
    assert all(trace.finish_reason == "length" and len(trace.completion_ids) == 5 for trace in traces)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_any_hugging_face_folder_can_be_sampled_and_resumed(tmp_path, monkeypatch, family):
    model = ModelConfig(name=str(tiny_folder(tmp_path, family, chat=True)), dtype="float32", device="cpu")
    assert_resume_is_exact(lambda _: job(model, per_digits=2, max_new_tokens=12), tmp_path, monkeypatch, points=3, every=False)


def test_a_cache_too_large_to_save_is_said_in_traces_summary_and_receipt(root):
    assert run(job(max_cache_gb=0), stop=StopAfter(10), quiet=True) == CONTINUE
    made = job(max_cache_gb=0)
    traces, summary = finish(made)
    assert 1 <= sum(trace.continued for trace in traces) == summary["continued"] <= 4
    assert read_receipt(made.results)["notes"] == {"continued": summary["continued"]}


def refused(made: GenerateTraces, kind: type[UserError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        run(made, quiet=True)
    assert "\n" not in str(caught.value) and not made.state.exists()
    return str(caught.value)


def test_what_cannot_work_is_refused_before_any_work(root):
    assert "use at most" in refused(job(max_new_tokens=600))
    assert "100 traces are wanted, but the plan has only 12 attempts" in refused(job(target_correct=50, target_incorrect=50))
    assert "no such folder" in refused(job(ModelConfig(name="./nothing")), ModelError)


def test_existing_traces_can_be_imported(root):
    made = job(per_digits=2, import_path=root / "mine.jsonl")
    problems = made.experiment.dataset.problems()
    rows = [{"problem_id": p.id, "completion": f"1+1=2 write 2</think>\nAnswer: {p.answer}"} for p in problems]
    rows.append({"problem_id": problems[0].id, "completion": "1+1=2 write", "finish_reason": "length"})
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    traces, summary = finish(made)
    assert [(trace.problem_id, trace.sample) for trace in traces] == [(p.id, 0) for p in problems] + [(problems[0].id, 1)]
    assert summary["verdicts"] == {"correct": 4, "incorrect": 0, "unparsable": 0, "truncated": 1}
    assert traces[0].thought == "1+1=2 write 2" and traces[0].completion_ids[-1] == 2 != traces[-1].completion_ids[-1]
    assert all(len(trace.logprobs) == len(trace.completion_ids) for trace in traces)


def test_imported_traces_get_the_log_probabilities_that_sampling_gives(root):
    sampled, _ = finish(job())
    rows = [{"problem_id": t.problem_id, "completion_ids": t.completion_ids, "finish_reason": t.finish_reason} for t in sampled]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    imported, _ = finish(job(import_path=root / "mine.jsonl", name="imported"))
    for first, second in zip(sampled, imported):
        assert second.logprobs == pytest.approx(first.logprobs, abs=1e-4)
        assert second.model_copy(update={"logprobs": first.logprobs}) == first
