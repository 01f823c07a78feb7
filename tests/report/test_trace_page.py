"""The page of a monitored trace: whole, escaped, alone, readable by day, by night and on a phone."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

import pytest

from tests.report.browser import Browser, Page, find
from tests.report.test_browser import FAINT_TEXT, TOO_WIDE
from tribunal.report.trace_page import HEIGHT, WIDTH, Passage, TracePage, build, curve, shade

HOSTILE = "</p><script>alert(1)</script> & <img src=x>"


def example(**changes) -> TracePage:
    long = "the residual stream of a very long thought " * 12
    passages = [
        Passage("<think>\n"),
        *(Passage(f"{long}{i}.", i / 10, 40 * i, -0.5) for i in range(11)),
        Passage(HOSTILE),
        Passage("x" * 400, 0.5, 499, -1.0),
    ]
    scores = [0.5 + 0.4 * (-1) ** i for i in range(500)]
    fields = {
        "title": "demo", "question": "47 + 77 =\nin two lines", "facts": [("model", f"some/model@{'f' * 40}")], "passages": passages,
        "scores": scores, "threshold": 0.5, "outcome": "P(correct) 0.500 after 500 tokens.", "planted": True,
    }  # fmt: skip
    return TracePage(**{**fields, **changes})


def test_the_text_is_there_in_order_and_whole_and_nothing_in_it_is_taken_for_html():
    page = example()
    made = build(page)
    trace = re.search(r'<p class="trace">(.*?)</p>', made, re.DOTALL).group(1)
    shown = html.unescape(re.sub(r"<small>\d+</small>|</?span[^>]*>", "", trace))
    assert shown == "".join(passage.text for passage in page.passages)
    assert "<script" not in made and "<img" not in made and html.escape(HOSTILE) in made


def test_scores_become_shades_and_a_line_within_the_plot():
    assert [shade(score) for score in (0, 0.04, 0.06, 0.5, 0.949, 1)] == ["p0", "p0", "p1", "p5", "p9", "p10"]
    assert curve([1.0, 0.0, 0.5]) == f"0,0 {WIDTH / 2:g},{HEIGHT} {WIDTH},{HEIGHT / 2:g}"
    assert curve([0.25]) == f"0,{HEIGHT * 0.75:g}" and len(curve([0.5] * 9000).split()) == 1000


def test_a_trace_without_a_token_has_a_page_too():
    made = build(example(passages=[], scores=[], outcome="The model ended at once: nothing to read.", planted=False))
    assert "nothing to read" in made and "<svg" not in made and "planted" not in made


def test_in_a_browser_it_asks_for_nothing_fits_a_phone_and_every_text_stands_out(tmp_path: Path):
    if (program := find()) is None:
        assert not os.environ.get("TRIBUNAL_REQUIRE_BROWSER"), "no browser"
        pytest.skip("no browser on PATH, and TRIBUNAL_BROWSER is not set")
    file = tmp_path / "trace.html"
    file.write_text(build(example()))
    browser = Browser(program, tmp_path / "profile")
    try:
        for options in ({"width": 320}, {"width": 390, "dark": True}, {"width": 1200}):
            page = Page(browser, file, **options)
            contrast = page.value(FAINT_TEXT)
            assert contrast["found"] == [] and contrast["seen"] > 30
            assert (contrast["paper"] < 0.05) == options.get("dark", False)
            assert page.value("document.scrollingElement.scrollWidth") <= options["width"] and page.value(TOO_WIDE) == []
            assert page.requests == [] and page.complaints == []
            page.close()
    finally:
        browser.close()
