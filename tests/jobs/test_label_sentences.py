"""The job: stops, shards, a failing judge, and what it publishes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.label_sentences import Config, LabelSentences
from tests.judge_server import JudgeServer
from tests.oracle.helpers import BUILTIN, additions
from tests.resume import assert_resume_is_exact
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import FINISHED, run
from tribunal.core.config import DatasetConfig, Experiment, SlurmConfig
from tribunal.core.errors import ConfigError
from tribunal.core.receipts import RECEIPT, digest, hash_outputs
from tribunal.core.storage import write_json, write_jsonl
from tribunal.models.judge import JudgeError
from tribunal.traces.sentence_labels import SentenceFile

MADE = additions(8)


def finish(folder: Path, **files) -> None:
    folder.mkdir(parents=True)
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    outputs = hash_outputs(folder)
    write_json(folder / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})


def job(root: Path, shard: Shard | None = None, **config) -> LabelSentences:
    if not (root / "results").exists():
        finish(root / "results/small/generate_traces", traces=[t for t, _, _ in MADE], problems=[p for _, _, p in MADE])
        finish(root / "results/small/label_traces", labels=[label for _, label, _ in MADE])
    experiment = Experiment(
        name="small",
        path=Path("small.yaml"),
        seed=0,
        model=BUILTIN,
        dataset=DatasetConfig(name="addition"),
        slurm=SlurmConfig(),
        sections={"label_sentences": Config(**config)},
        given=frozenset(),
    )
    return LabelSentences(experiment, shard)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path


def test_every_sentence_of_every_trace_gets_its_class_tier_and_tracked_answer(root):
    made = job(root)
    assert run(made, quiet=True) == FINISHED
    rows = SentenceFile(made.results / "sentences.jsonl")
    assert list(rows) == [trace.key for trace, _, _ in MADE]
    for trace, label, problem in MADE:
        sentences = rows[trace.key].sentences
        steps = len(label.sentences) - 1
        assert [s.sentence_class for s in sentences] == ["active_computation"] * steps + ["final_answer_emission"]
        assert all(s.importance is not None for s in sentences[:steps]) and sentences[-1].importance is None
        assert all(s.answer_logprob is not None for s in sentences[:steps]) and sentences[-1].answer_logprob is None
        assert all(s.tier is not None for s in sentences[:steps]) == (problem.stratum == "4 digits")  # fewer cannot be ranked
    audit = json.loads((made.results / "audit.json").read_text())
    assert audit["traces"] == 8 and audit["set_aside"] == [] and audit["classes"]["none"] == 0
    assert set(audit["importance"]["counts"].values()) == {2}


def test_stopped_after_any_trace_and_resumed_it_publishes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.jobs.test_label_sentences.MADE", MADE[:4])
    assert_resume_is_exact(job, tmp_path, monkeypatch, points=2)


def test_rollouts_stopped_in_the_middle_of_a_trace_and_resumed_give_the_same_bytes(tmp_path, monkeypatch):
    rollouts = {"samples": 2, "max_new_tokens": 30, "slots": 4}
    config = {"importance": "rollouts", "rollouts": rollouts, "samples_per_problem": 1, "track_answers": False}
    monkeypatch.setattr("tests.jobs.test_label_sentences.MADE", MADE[:2])
    assert_resume_is_exact(lambda folder: job(folder, **config), tmp_path, monkeypatch, points=4, every=False)


def test_a_trace_whose_rollouts_tell_nothing_from_chance_gets_importances_and_no_tier(root):
    rollouts = {"samples": 2, "max_new_tokens": 60, "slots": 20}  # two rollouts a side cannot be told from chance
    made = job(root, importance="rollouts", rollouts=rollouts, samples_per_problem=1, classes="none", track_answers=False)
    assert run(made, quiet=True) == FINISHED
    sentences = [s for row in SentenceFile(made.results / "sentences.jsonl").values() for s in row.sentences]
    measured = [s for s in sentences if s.importance is not None]
    assert measured and all(s.importance_p is not None and s.importance_by_chance is not None for s in measured)
    assert all(s.tier is None for s in sentences)
    audit = json.loads((made.results / "audit.json").read_text())
    assert audit["importance"]["by_chance"]["traces_within_chance"] == 8
    assert any("in 8 of 8 traces no sentence moves the answers more than chance" in line for line in audit["warnings"])


def test_any_number_of_shards_gives_the_same_labels(tmp_path, monkeypatch):
    digests = set()
    for count in (1, 3):
        monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path / str(count)))
        for index in range(count):
            made = job(tmp_path / str(count), Shard(index, count))
            assert run(made, quiet=True) == FINISHED
        digests.add(digest(hash_outputs(made.results)))
    assert len(digests) == 1


def test_a_judge_that_fails_halfway_stops_the_job_with_one_line_and_what_it_labelled_is_kept_when_it_moves_to_another_host(root):
    questions = []

    def reply(question: str) -> str:
        if "Sentences:" not in question:
            return "ready"
        questions.append(question)
        numbers = re.findall(r"^(\d+)\. ", question.partition("Sentences:")[2], re.MULTILINE)
        return "I do not know" if broken and len(questions) > 3 else json.dumps(dict.fromkeys(numbers, "fact_retrieval"))

    def judged(server: JudgeServer, attempts: int) -> LabelSentences:
        judge = {"url": server.url, "model": "stub", "attempts": attempts}
        return job(root, classes="judge", judge=judge, importance="none", track_answers=False)

    broken = True
    with JudgeServer(reply) as server, pytest.raises(JudgeError, match=r"no JSON object.*'I do not know'.*2 attempts.*kept"):
        run(judged(server, 2), quiet=True)
    broken, asked = False, len(questions)
    with JudgeServer(reply) as server:
        made = judged(server, 3)
        assert run(made, quiet=True) == FINISHED
    assert asked == 5 and len(questions) == asked + 5  # three traces were done and are not asked about again
    audit = json.loads((made.results / "audit.json").read_text())
    assert audit["classes"]["by"] == "judge" and audit["classes"]["counts"]["fact_retrieval"] == audit["sentences"]
    assert "labelled sentences are 'fact_retrieval'" in audit["warnings"][0]


def test_bad_settings_are_refused_before_anything_starts(root):
    with pytest.raises(ValidationError, match="classes: judge needs a judge block"):
        Config(classes="judge")
    with pytest.raises(ValidationError, match="nothing is to be labelled"):
        Config(classes="none", importance="none", track_answers=False)
    with pytest.raises(ConfigError, match=r"label_sentences\.lens_layer: no layer 3; builtin:addition has 3 layers"):
        job(root, lens_layer=3).check()
    judge = {"url": "http://127.0.0.1:9", "model": "stub", "attempts": 1}
    with pytest.raises(JudgeError, match="cannot be reached"):
        run(job(root, classes="judge", judge=judge), quiet=True)
