"""``tribunal ask``: a question to a trained oracle about a sentence, beside its answers without activations."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.calibrated import Calibrated
from tests.jobs.test_train_oracle import SMALL
from tribunal.cli import app
from tribunal.cluster.launch import make_job, run
from tribunal.core.records import TraceLabel
from tribunal.core.storage import iter_jsonl
from tribunal.oracle import asking
from tribunal.traces.files import TraceFile

TASKS = "train_oracle.tasks=[carry,correctness]"


@pytest.fixture(scope="module")
def root(calibrated: Calibrated, tmp_path_factory):
    root = tmp_path_factory.mktemp("asked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIBUNAL_ROOT", str(root))
        assert run(calibrated.job("train_oracle", root, *SMALL, TASKS), quiet=True) == 0
    return root


def first_label(root: Path) -> TraceLabel:
    return next(iter_jsonl(root / "results/small/label_traces/labels.jsonl", TraceLabel))


@pytest.fixture
def ask(root: Path, calibrated: Calibrated, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(root))
    key = first_label(root).key

    def put(*words: str, trace: str = key, sentence: int = 0) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["ask", str(calibrated.path), "--trace", trace, "--sentence", str(sentence), *words])
        return result.exit_code, result.output

    return put


def test_the_answer_stands_beside_those_without_activations(ask):
    code, output = ask("c")
    assert code == 0, output
    assert re.search(r"^sentence 0 of .+: \d\+\d=\d+ write \d", output, re.MULTILINE)
    assert re.search(r"^oracle \(step [24]; 11 tokens at layer 1\): ", output, re.MULTILINE)
    assert re.search(r"^with nothing injected: .*\ntrained without activations: ", output, re.MULTILINE) and "note" not in output
    assert "note: this was not trained on layer 2\n" in ask("c", "--layer", "2")[1]


def test_a_task_is_asked_about_the_layer_and_the_tokens_that_it_was_trained_on(root, ask, monkeypatch):
    """``correctness`` reads layer 2 up to the sentence's end, ``carry`` layer 1 up to the boundary behind it."""
    seen = []
    monkeypatch.setattr(asking.ActivationSource, "vectors", lambda self, examples: seen.extend(examples) or iter(()))
    for code in "cv":
        assert ask(code)[0] != 0, "no vectors, no answer"
    carry, correctness = seen
    end = first_label(root).sentences[0].end_token
    assert (carry.layers, carry.tokens[-1], len(carry.tokens)) == ([1], end, 11)
    assert (correctness.layers, correctness.tokens[-1], len(correctness.tokens)) == ([2], end - 1, 11)


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["What is carried?"], {}, r"question 'What is carried\?': .* by their codes: c \(carry\), v \(correctness\)"),
        (["c"], {"trace": "1+1/7"}, r"--trace 1\+1/7: no such trace"),
        (["c"], {"sentence": 99}, r"--sentence 99: trace .+ has \d+ sentences, 0 to \d"),
        (["c", "--layer", "3"], {}, r"--layer 3: builtin:addition has 3 layers, 0 to 2"),
        (["c", "--step", "3"], {}, r"--step 3: no adapter was kept there; kept are 2, 4"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(ask, words, given, message):
    code, output = ask(*words, **given)
    assert code == 2 and re.search(message, output) and output.count("\n") == 1, output


def test_an_oracle_of_traces_that_were_made_anew_is_not_asked(root, ask, calibrated, tmp_path, monkeypatch):
    shutil.copytree(root / "results", tmp_path / "results")
    monkeypatch.setenv("TRIBUNAL_ROOT", str(tmp_path))
    for job in ("generate_traces", "label_traces"):
        shutil.rmtree(tmp_path / "results/small" / job)
        assert run(make_job(job, calibrated.experiment("generate_traces.temperature=0.9")), quiet=True) == 0
    code, output = ask("c", trace=TraceFile(tmp_path / "results/small/generate_traces/traces.jsonl").keys[0])
    assert code == 2 and "results of train_oracle, which are stale (generate_traces, label_traces changed since)" in output, output
