"""Bad files are refused in one line that names file, line, field and cure."""

from __future__ import annotations

import sys
import types

import pytest

from tribunal.core import registry
from tribunal.core.config import DatasetConfig
from tribunal.core.errors import DataError, UserError
from tribunal.datasets import rows
from tribunal.datasets.gsm8k import Dataset


def gsm8k(path, **keys):
    return Dataset(name="gsm8k", path=path, **keys).problems()


GOOD = '{"question": "q", "answer": "3 + 4 = 7\\n#### 7"}\n'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"question": "q"}', ["line 2", "answer: missing", "'####'"]),
        ('{"question": "q", "answer": null}', ["line 2", "answer: missing"]),
        ('{"question": "q", "answer": " "}', ["line 2", "answer: empty"]),
        ('{"question": "q", "answer": ["7"]}', ["line 2", "answer: expected text", "['7']"]),
        ('{"question": "", "answer": "#### 7"}', ["line 2", "question: empty"]),
        ('{"question": "q", "answer": "#### seven"}', ["line 2", "answer", "'seven' is not a number"]),
        ('{"question": "q", "answer": "no marker"}', ["line 2", "'no marker' is not a number", "'####'"]),
        ('{"question": "q", "answer": "#### 7"', ["line 2", "not valid JSON", "column"]),
        ("[1, 2]", ["line 2", "expected a JSON object", "[1, 2]"]),
        ("[" * 100_000, ["line 2", "not valid JSON"]),
    ],
)
def test_a_bad_line_is_named_with_file_line_field_and_cure(tmp_path, line, parts):
    path = tmp_path / "mine.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(DataError) as caught:
        gsm8k(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in parts:
        assert part in message


def test_blank_lines_and_a_byte_order_mark_do_no_harm_and_lines_are_counted_as_in_an_editor(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\ufeff" + GOOD + "\n\n" + GOOD.replace("q", "line\u2028separator") + "{\n")
    with pytest.raises(DataError, match="line 5"):
        gsm8k(path)


def test_missing_path_wrong_folder_binary_and_empty_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.path: .*nowhere.*no such file"):
        gsm8k(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected test\.jsonl or .* found notes\.txt"):
        gsm8k(tmp_path / "folder")
    (tmp_path / "binary.jsonl").write_bytes(GOOD.encode() + b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        gsm8k(tmp_path / "binary.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        gsm8k(tmp_path / "empty.jsonl")


def test_the_revision_of_a_local_file_changes_with_its_content(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(GOOD)
    before = gsm8k(tmp_path)[0].revision
    assert before.startswith("sha256:") and len(before) == len("sha256:") + 16
    path.write_text(GOOD + GOOD)
    assert gsm8k(tmp_path)[0].revision != before


def test_csv_json_and_jsonl_give_the_same_rows(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n1,"two\nlines"\n')
    (tmp_path / "a.json").write_text('[{"x": "1", "y": "two\\nlines"}]')
    (tmp_path / "b.json").write_text('{"examples": [{"x": "1", "y": "two\\nlines"}], "canary": "c"}')
    (tmp_path / "a.jsonl").write_text('{"x": "1", "y": "two\\nlines"}\n')
    for name in ("a.csv", "a.json", "b.json", "a.jsonl"):
        assert [dict(row.values) for row in rows.read_file(tmp_path / name).rows] == [{"x": "1", "y": "two\nlines"}]


def fake_hub(monkeypatch, load):
    hub = types.ModuleType("datasets")
    hub.load_dataset = load
    hub.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "datasets", hub)


def test_without_a_path_the_pinned_commit_is_loaded_and_recorded(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "q", "answer": "#### 1,080"}]

    fake_hub(monkeypatch, load)
    problem = Dataset(name="gsm8k", split="train").problems()[0]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": problem.revision})]
    assert problem.answer == "1080" and len(problem.revision) == 40


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_cure(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong traceback")

    fake_hub(monkeypatch, load)
    with pytest.raises(UserError) as caught:
        Dataset(name="gsm8k").problems()
    message = str(caught.value)
    assert "\n" not in message and "openai/gsm8k" in message and "Couldn't reach the Hub" in message and "dataset.path" in message
    with pytest.raises(UserError, match=r"dataset\.revision: missing"):
        Dataset(name="gsm8k", revision=None).problems()


def test_every_module_of_the_package_that_is_offered_is_a_dataset():
    names = registry.names("tribunal.datasets")
    assert {"addition", "gsm8k", "math500", "math_levels", "gpqa", "bbh", "jsonl"} <= set(names)
    assert not {"answers", "rows"} & set(names)
    for name in names:
        assert issubclass(registry.load("tribunal.datasets", name, "dataset").Dataset, DatasetConfig)
