"""``tribunal monitor``: one question, its sentences under their scores, and a page that stands alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.calibrated import Calibrated
from tribunal.cli import app
from tribunal.core.records import TraceLabel
from tribunal.core.storage import iter_jsonl


@pytest.fixture
def monitor(calibrated: Calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUNAL_ROOT", str(calibrated.root))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["monitor", str(calibrated.path), *words])
        return result.exit_code, result.output

    return run


def test_a_problem_is_answered_as_it_was_sampled_and_scored_by_a_direction_that_has_not_seen_it(monitor, calibrated, tmp_path):
    label = next(iter_jsonl(calibrated.root / "results/small/label_traces/labels.jsonl", TraceLabel))
    code, output = monitor("--problem", label.problem_id, "--sample", str(label.sample))
    assert code == 0, output
    assert f"fitted without problem {label.problem_id} and its fold" in output
    assert f"The answer is {label.answer}: {label.verdict} (gold: {label.gold})" in output
    scores = re.findall(r"^ ([01]\.\d\d) [█░]{10}  ", output, re.MULTILINE)
    assert len(scores) == len(label.sentences) and "planted" in output and "\x1b" not in output
    page = (tmp_path / "monitor-small.html").read_text()
    assert page.count('class="sentence p') == len(label.sentences) and "planted" in page


def test_a_free_question_has_no_verdict_but_one_that_was_sampled_is_recognised(monitor, calibrated, tmp_path):
    code, output = monitor("--prompt", "81234 + 12345 =", "--page", "own.html", "--temperature", "0", "--pooling", "last")
    assert code == 0 and "gold" not in output and "last, logistic; fitted on all labelled traces" in output
    assert (tmp_path / "own.html").is_file()
    label = next(iter_jsonl(calibrated.root / "results/small/label_traces/labels.jsonl", TraceLabel))
    question = f"{label.problem_id.replace('+', ' + ')} ="
    code, output = monitor("--prompt", question, "--layer", "1")
    assert f"fitted on problem {label.problem_id} too, so its score here is optimistic" in output and f"(gold: {label.gold})" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "wants one question: --prompt TEXT, or --problem ID"),
        (("--prompt", "1 + 1 =", "--problem", "1+1"), "wants one question"),
        (("--problem", "nothing"), "--problem nothing: not in the dataset 'addition'; it has 60 problems, the first is '"),
        (("--prompt", " "), "--prompt: empty"),
        (("--prompt", "1 + 1 =", "--layer", "7"), "no logistic direction for layer 7"),
        (("model.dtype=bfloat16", "--prompt", "1 + 1 ="), "its dtype is float32, the model's bfloat16"),
        (("name=other", "--prompt", "1 + 1 ="), "reads the results of train_probes, which has not finished for experiment 'other'"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line_and_no_page_is_left(monitor, tmp_path, words, said, capfd):
    code, output = monitor(*words)
    output += capfd.readouterr().err
    assert code == 2 and said in output and output.count("\n") == 1
    assert not list(Path(tmp_path).glob("*.html"))
