"""What the page says of an experiment's files: all of it, escaped, and nothing that the receipts do not vouch for."""

from __future__ import annotations

import base64
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import load_file

from tests.report.examples import AUDIT, HOSTILE, PIPELINES, control, count, experiment, finish, measure, row
from tribunal.core.errors import CorruptError, DataError
from tribunal.core.receipts import RECEIPT
from tribunal.core.records import ReportRow
from tribunal.core.storage import read_json, write_json
from tribunal.report import intervals
from tribunal.report.page import build
from tribunal.report.rendering import render

ROOT = Path(__file__).resolve().parents[2]


class Reader(HTMLParser):
    """The page as a browser without style would read it: text by section, and what it refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.open: dict[str, str] = {}
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.handlers: list[str] = []
        self._now, self._folded, self._skip = "top", 0, 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "section":
            self._now = given["aria-labelledby"]
        self.ids += [given["id"]] if "id" in given else []
        self.refers += [given[name] for name in ("href", "src", "srcset", "action", "data") if name in given]
        self._folded += (tag == "details") - (tag == "summary")
        self.handlers += [name for name in given if name.startswith("on")]
        self._skip += tag in ("style", "script")
        if tag == "img":
            self.images.append((given["alt"], given["src"]))

    def handle_endtag(self, tag: str) -> None:
        self._folded -= (tag == "details") - (tag == "summary")
        self._skip -= tag in ("style", "script")
        if tag == "section":
            self._now = "top"

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.sections[self._now] = " ".join(f"{self.sections.get(self._now, '')} {data}".split())
        if not self._folded:
            self.open[self._now] = " ".join(f"{self.open.get(self._now, '')} {data}".split())


def read(results: Path, **more) -> Reader:
    return Reader(build(results, pipelines=PIPELINES, **more))


def test_every_measuring_job_has_a_section_with_verdict_limits_rows_and_controls_also_one_nobody_has_heard_of(tmp_path: Path):
    page = read(experiment(tmp_path))
    assert list(page.sections)[:6] == ["top", "summary", "jobs", "labels", "train_probes", "a_newcomer"]
    for job in ("train_probes", "a_newcomer"):
        assert f"The verdict of {job}. It is honest." in page.open[job]
        assert f"The verdict of {job}. It is honest." in page.open["summary"]
        assert "Not supported That anything uses it." in page.open[job]
    assert "0.900 [0.870, 0.930]" in page.open["train_probes"]
    assert "length 0.800 [0.780, 0.820]" in page.open["train_probes"]
    assert "+0.100 [+0.060, +0.140]" in page.open["train_probes"]
    assert "1,439" in page.open["train_probes"]
    assert page.sections["a_newcomer"].startswith("A newcomer") and "Odd metric" in page.sections["a_newcomer"]
    assert "bag of words the words of the text" in page.sections["controls"]
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.refers if address.startswith("#")} <= set(page.ids)


def test_the_first_rows_stand_open_and_all_of_them_are_there(tmp_path: Path):
    page = read(experiment(tmp_path))
    name = "layer {}, mean of the logits of every sentence"
    assert name.format(4) in page.open["train_probes"] and name.format(5) not in page.open["train_probes"]
    assert "All 25 rows" in page.open["train_probes"]
    assert all(name.format(layer) in page.sections["train_probes"] for layer in range(20))


def test_figures_are_inside_the_page_and_it_refers_to_nothing_else(tmp_path: Path):
    results = experiment(tmp_path)
    html = build(results, pipelines=PIPELINES)
    page = Reader(html)
    ((alt, source),) = page.images
    assert alt.startswith("Probes: the figure")
    assert base64.b64decode(source.partition("base64,")[2]) == (results / "train_probes" / "the_figure.png").read_bytes()
    assert [address for address in page.refers if not address.startswith(("#", "data:"))] == []
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "<script" not in html and page.handlers == []


def test_whatever_the_files_say_is_text_and_no_markup(tmp_path: Path):
    results = tmp_path / "results" / "x"
    audit = {**AUDIT, "warnings": [HOSTILE], "strata": {HOSTILE: {HOSTILE: count(1, 1.0)}}}
    finish(results, "label_traces", {"audit.json": audit}, set_aside=[HOSTILE], hardware=HOSTILE)
    measure(results, "train_probes", [row(HOSTILE, stratum=HOSTILE, metric=HOSTILE)], verdict=HOSTILE, not_supported=[HOSTILE])
    html = build(results, pipelines={HOSTILE: [HOSTILE], "calibrate": ["label_traces"]}, unfinished={"steer": HOSTILE})
    assert "<script" not in html
    for attribute in re.findall(r'(?:aria-label|alt)="([^"]*)"', html):
        assert "<" not in attribute
    assert unescape(html).count(HOSTILE) >= 12


def test_the_table_of_jobs_says_what_is_finished_missing_under_way_and_not_begun(tmp_path: Path):
    results = tmp_path / "results" / "x"
    finish(results, "generate_traces", set_aside=["p1/0", "p2/3"])
    page = read(results, unfinished={"label_traces": "running, 34 of 120 traces"})
    jobs = page.open["jobs"]
    assert "generate_traces finished 24 traces 2 3.3 min 2" in jobs
    assert "label_traces unfinished running, 34 of 120 traces" in jobs
    assert "train_probes missing" in jobs
    assert "Not begun: Oracle (train_oracle, evaluate_oracle)" in jobs
    assert "generate_traces left out 2 units: p1/0, p2/3." in jobs
    assert "No job that measures something has finished." in page.open["summary"]
    assert "labels" not in page.sections and "controls" not in page.sections


def test_a_result_whose_inputs_changed_is_stale_and_so_is_what_reads_it(tmp_path: Path):
    results = experiment(tmp_path)
    assert "stale:" not in read(results).open["summary"].lower()
    finish(results, "label_traces", {"audit.json": {**AUDIT, "traces": 7}}, inputs=["generate_traces"])
    page = read(results)
    assert "train_probes stale label_traces changed since" in page.open["jobs"]
    assert "a_newcomer stale train_probes is stale" in page.open["jobs"]
    assert "label_traces finished" in page.open["jobs"]
    assert "Stale: Probes, A newcomer." in page.open["summary"] and "Probes (stale)." in page.open["summary"]
    assert "Stale: label_traces changed since." in page.open["train_probes"]


def test_a_planted_signal_is_said_where_the_model_is_the_built_in_one(tmp_path: Path):
    results = experiment(tmp_path)
    assert "planted" not in read(results).open["summary"]
    for file in results.glob(f"*/{RECEIPT}"):
        receipt = read_json(file)
        receipt["config"]["model"] = {"name": "builtin:addition", "dtype": "float32"}
        write_json(file, receipt)
    assert "The signal is planted : the built-in model was trained" in read(results).open["summary"]


def test_the_page_names_model_and_dataset_but_nobodys_folders(tmp_path: Path):
    page = read(experiment(tmp_path))
    assert "Model Qwen/Qwen3-8B, 0123456789ab, bfloat16" in page.sections["top"]
    assert "Dataset gsm8k, path test.jsonl" in page.sections["top"]
    assert "secret" not in str(page.sections)


@pytest.mark.parametrize("name", ["report.json", "the_figure.png"])
def test_a_file_that_is_not_the_one_in_the_receipt_is_refused_by_name(tmp_path: Path, name: str):
    results = experiment(tmp_path)
    file = results / "train_probes" / name
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(CorruptError, match=rf"{name} does not match the hash"):
        build(results, pipelines=PIPELINES)
    file.unlink()
    with pytest.raises(CorruptError, match=rf"{name}: missing"):
        build(results, pipelines=PIPELINES)


def test_without_a_finished_job_there_is_no_page_but_one_line(tmp_path: Path):
    (tmp_path / "x" / ".train_probes.staging-1").mkdir(parents=True)
    with pytest.raises(DataError, match="no job has finished there"):
        build(tmp_path / "x", pipelines=PIPELINES)


def test_an_audit_of_another_version_is_named_with_the_field(tmp_path: Path):
    finish(tmp_path / "x", "label_traces", {"audit.json": {"traces": "many"}})
    with pytest.raises(DataError, match=r"audit.json: traces: .*another version"):
        build(tmp_path / "x", pipelines=PIPELINES)


def test_dots_and_ends_of_intervals_stand_where_their_values_are():
    rows = [row("a", 0.9), row("b", 0.5)]
    scale = intervals.scale(rows)
    low, high = 0.5 - 0.3 - 0.05, 0.93  # bag_of_words of b; a itself
    for mark, value in ((scale.mark("x", 0.5, low, high), 0.5), (scale.mark("x", 0.7, low, high), 0.7)):
        assert mark.low == intervals.MARGIN and mark.high == intervals.WIDTH - intervals.MARGIN
        assert mark.x == pytest.approx(mark.low + (value - low) / (high - low) * (mark.high - mark.low), abs=0.06)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.48, 0.95, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (-2.0, 2.0, [-2, 0, 2]),
        (0.0, 0.13, [0.0, 0.05, 0.1]),
        (1234.0, 1301.0, [1240, 1260, 1280, 1300]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low: float, high: float, ticks: list[float]):
    assert intervals.round_ticks(low, high) == pytest.approx(ticks)


def test_a_scale_without_extent_still_has_one():
    lone = ReportRow(name="x", metric="m", value=1, low=1, high=1, n=1, controls=[control("length", 1, 0)])
    assert intervals.scale([lone]).x(1) == intervals.WIDTH / 2


def test_a_template_that_names_what_is_not_there_fails(tmp_path: Path):
    with pytest.raises(Exception, match="undefined"):
        render("report.html.j2")


def test_an_installed_package_has_every_file_that_is_no_python():
    patterns = load_file(ROOT / "pyproject.toml")["tool"]["setuptools"]["package-data"]["tribunal"]
    packed = {file for pattern in patterns for file in (ROOT / "tribunal").glob(pattern) if file.is_file()}
    there = {file for file in (ROOT / "tribunal").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert there - packed == set() and any(file.suffix == ".j2" for file in packed)
