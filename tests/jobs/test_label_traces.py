"""The label job on hand-made results of generate_traces, with the built-in reasoner's tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.label_traces import Config, LabelTraces
from tests.resume import assert_resume_is_exact, undisturbed
from tribunal.cluster.job import Shard
from tribunal.cluster.launch import FINISHED, run
from tribunal.core.config import DatasetConfig, Experiment, ModelConfig, SlurmConfig
from tribunal.core.errors import CorruptError, DataError, LabelError
from tribunal.core.receipts import RECEIPT, digest, hash_outputs
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.storage import read_jsonl, write_json, write_jsonl
from tribunal.models.describe import load_format

MODEL = ModelConfig(name="builtin:addition", dtype="float32", device="cpu")
COMPLETIONS = [
    "7+5=12 write 2 carry 1 | 4+8+1=13 write 3</think>\nAnswer: 32<sep>y<eos>",
    "7+5=12 write 2 carry 1 | 4+8+1=13 write 4</think>\nAnswer: 42<sep>n<eos>",
    "7+5=12 write 2 carry 1 | wait 7+5=12 write",
    "7+5=12 write 2</think>\nAnswer: <eos>",
]


def prepare(folder: Path, count: int = 8, *, spoil: str | None = None) -> None:
    """Results of generate_traces, as if they had been sampled."""
    text_format, _ = load_format(MODEL)
    problem = Problem(id="17+15", question="17 + 15 =", answer="32", stratum="2 digits", dataset="addition", revision="generator 1")
    traces = []
    for number in range(count):
        ids = text_format.tokenizer(COMPLETIONS[number % 4], add_special_tokens=False)["input_ids"]
        reading = text_format.read(ids, text_format.prompt_ids(problem))
        traces.append(
            Trace(
                problem_id=problem.id,
                sample=0 if spoil == "twice" else number,
                prompt_ids=text_format.prompt_ids(problem),
                completion_ids=ids,
                logprobs=[-0.1] * len(ids),
                finish_reason="length" if number % 4 == 2 else "stop",
                seed=0,
                **reading._asdict(),
                model="builtin:addition@1",
                template_sha256=text_format.template_sha256,
            )
        )
    out = folder / "results" / "small" / "generate_traces"
    out.mkdir(parents=True)
    write_jsonl(out / "traces.jsonl", traces)
    write_jsonl(out / "problems.jsonl", [problem] if spoil != "problem" else [problem.model_copy(update={"id": "other"})])
    outputs = hash_outputs(out)
    write_json(out / RECEIPT, {"schema_version": 1, "outputs": outputs, "digest": digest(outputs)})


def job(folder: Path, shard: Shard | None = None, **config: int) -> LabelTraces:
    if not (folder / "results").exists():
        prepare(folder)
    experiment = Experiment(
        name="small",
        path=Path("small.yaml"),
        seed=0,
        model=MODEL,
        dataset=DatasetConfig(name="addition"),
        slurm=SlurmConfig(),
        sections={"label_traces": Config(**{"min_per_class": 2, "cross_check": 4, "chunk": 3, **config})},
        given=frozenset(),
    )
    return LabelTraces(experiment, shard)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    return tmp_path


def test_every_trace_gets_its_verdict_answer_and_sentences_in_the_order_of_the_traces(root):
    made = job(root)
    assert run(made, quiet=True) == FINISHED
    labels = read_jsonl(made.results / "labels.jsonl", TraceLabel)
    assert [label.sample for label in labels] == list(range(8))
    assert [label.verdict for label in labels[:4]] == ["correct", "incorrect", "truncated", "unparsable"]
    assert [label.answer for label in labels[:4]] == ["32", "42", None, None]
    assert labels[0].stratum == "2 digits" and labels[0].gold == "32"
    text_format, _ = load_format(MODEL)
    trace = read_jsonl(root / "results/small/generate_traces/traces.jsonl", Trace)[0]
    text = text_format.decode(trace.completion_ids[: trace.readable])
    spans = labels[0].sentences
    assert [text[span.start_char : span.end_char] for span in spans] == ["7+5=12 write 2 carry 1", "4+8+1=13 write 3", "Answer: 32"]
    for span in spans:
        tokens = text_format.decode(trace.completion_ids[span.start_token : span.end_token])
        assert tokens.strip() == text[span.start_char : span.end_char]
    audit = json.loads((made.results / "audit.json").read_text())
    assert audit["verdicts"]["correct"]["count"] == 2 and audit["verdicts"]["truncated"]["finish"] == {"length": 2, "stop": 0}
    assert "truncated" in audit["warnings"][0] and audit["graders"]["checked"] == 2


def test_stopped_after_any_trace_and_resumed_it_publishes_the_same_bytes(tmp_path, monkeypatch):
    assert_resume_is_exact(job, tmp_path, monkeypatch)


def test_shards_and_chunk_sizes_give_the_same_labels(tmp_path, monkeypatch):
    digests = set()
    for shards, chunk in ((1, 64), (1, 1), (2, 1), (3, 2)):
        folder = tmp_path / f"{shards}-{chunk}"
        monkeypatch.setenv("TRIBUNAL_ROOT", str(folder))
        for index in range(shards):
            made = job(folder, Shard(index, shards), chunk=chunk)
            assert run(made, quiet=True) == FINISHED
        digests.add(digest(hash_outputs(made.results)))
    assert len(digests) == 1


def test_too_few_of_a_class_are_refused_with_the_counts_and_a_lower_bar_goes_on_from_the_labels(root):
    with pytest.raises(LabelError, match=r"2 correct, 2 incorrect, 2 unparsable, 2 truncated.*min_per_class asks for 20"):
        run(job(root, min_per_class=20), quiet=True)
    made = job(root, min_per_class=2)
    assert not made.results.exists()
    receipt, _ = undisturbed(lambda: made)
    assert receipt["totals"]["units"] == 8


@pytest.mark.parametrize(
    ("spoil", "message"), [("twice", "line 2: trace 17\\+15/0 is there already in line 1"), ("problem", "not in problems.jsonl")]
)
def test_traces_that_do_not_fit_their_problems_are_refused(root, spoil, message):
    prepare(root, spoil=spoil)
    with pytest.raises(DataError, match=message):
        run(job(root), quiet=True)


def test_a_changed_trace_file_is_refused(root):
    made = job(root)
    path = root / "results/small/generate_traces/traces.jsonl"
    path.write_text(path.read_text().replace("stop", "stpo"))
    with pytest.raises(CorruptError, match=r"traces\.jsonl"):
        run(made, quiet=True)


def test_the_job_and_all_datasets_are_imported_without_torch():
    code = (
        "import sys, jobs.label_traces, tribunal.traces.imports\nfrom tribunal.core import registry\n"
        "for name in registry.names('tribunal.datasets'): registry.load('tribunal.datasets', name, 'dataset')\n"
        "print([m for m in ('torch', 'transformers', 'sympy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
