"""The page in a real browser: it loads whole and alone, fits a phone, and can be read by day, by night and by keyboard.

Without a browser these tests are skipped, with the reason; where ``TRIBUNAL_REQUIRE_BROWSER`` is set (``.ci/run``) they fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import NAMES, Browser, Page, find
from tests.report.examples import PIPELINES, experiment
from tribunal.report.page import build

FAINT_TEXT = """(() => {
    const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = colour => { paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => { for (; element; element = element.parentElement) {
        const colour = rgba(getComputedStyle(element).backgroundColor); if (colour[3] === 255) return colour; } return [255, 255, 255]; };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    let seen = 0;
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
        if (!text || element.closest('title') || !element.getClientRects().length) continue;
        const style = getComputedStyle(element), own = rgba(element instanceof SVGElement ? style.fill : style.color);
        const [a, b] = [light(own), light(behind(element))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
        seen += 1;
        if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)}`);
    }
    return {seen, found, paper: light(rgba(getComputedStyle(document.body).backgroundColor))};
})()"""
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *') && !e.closest('.skip, .hidden'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true; })"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        why = f"no browser: none of {', '.join(NAMES)} is on PATH, and TRIBUNAL_BROWSER is not set"
        if os.environ.get("TRIBUNAL_REQUIRE_BROWSER"):
            pytest.fail(why)
        pytest.skip(why)
    made = Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(build(experiment(folder), pipelines=PIPELINES))
    return path


@pytest.fixture
def opened(browser: Browser) -> Iterator[object]:
    pages: list[Page] = []

    def open_page(file: Path, **options: object) -> Page:
        pages.append(Page(browser, file, **options))  # type: ignore[arg-type]
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def test_the_page_loads_whole_asks_for_nothing_and_the_console_stays_empty(opened, file):
    page = opened(file)
    assert page.value("[...document.images].map(image => image.complete && image.naturalWidth > 100)") == [True]
    assert page.value("document.querySelectorAll('svg circle').length") > 50
    assert page.requests == [] and page.complaints == []


@pytest.mark.parametrize(
    "spoilt",
    ['<img src="http://example.org/x.png" alt="">', "<script>console.log('here')</script>", '<link rel="stylesheet" href="x.css">'],
)
def test_the_test_sees_a_request_or_a_script_and_the_pages_policy_stops_it(opened, file, tmp_path, spoilt):
    copy = tmp_path / "spoilt.html"
    copy.write_text(file.read_text().replace("</main>", f"{spoilt}</main>"))
    page = opened(copy)
    assert page.complaints, "the policy has stopped nothing"
    assert not any("here" in line for line in page.complaints)
    without = tmp_path / "open.html"
    without.write_text(copy.read_text().replace("Content-Security-Policy", "x"))
    page = opened(without)
    assert page.requests or page.complaints


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
def test_nothing_is_wider_than_the_window_also_with_everything_unfolded(opened, file, width):
    page = opened(file, width=width)
    for unfold in ("0", OPEN_ALL):
        page.value(unfold)
        assert page.value("document.scrollingElement.scrollWidth") <= width
        assert page.value(TOO_WIDE) == []
    wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
    assert page.value(f"{wide}.length") > 0, "no table is wide enough to try it"
    assert page.value(f"{wide}.every(box => box.tabIndex === 0 && box.getAttribute('aria-label'))")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(opened, file, dark):
    page = opened(file, dark=dark)
    page.value(OPEN_ALL)
    contrast = page.value(FAINT_TEXT)
    assert contrast["found"] == [] and contrast["seen"] > 200
    assert (contrast["paper"] < 0.05) if dark else (contrast["paper"] > 0.9)
    if dark:
        assert page.value("getComputedStyle(document.images[0]).backgroundColor") == "rgb(255, 255, 255)"


def test_the_page_is_walked_through_by_keyboard_and_by_landmarks(opened, file):
    page = opened(file)
    for key in range(2):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        focus = page.value("[document.activeElement.getAttribute('href'), getComputedStyle(document.activeElement).outlineStyle]")
        assert focus == [["#content", "solid"], ["#summary", "solid"]][key]
    assert page.value("['header', 'nav', 'main', 'footer'].map(name => document.querySelectorAll(name).length)") == [1, 1, 1, 1]
    assert page.value("[...document.querySelectorAll('h1')].length") == 1
    assert page.value("[...document.querySelectorAll('th')].every(head => head.scope && head.textContent.trim())")
    assert page.value("[...document.images].every(image => image.alt.length > 10) && document.documentElement.lang === 'en'")


def test_on_paper_it_is_black_on_white_and_nothing_is_cut_off(opened, file):
    page = opened(file, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print")
    contrast = page.value(FAINT_TEXT)
    assert contrast["paper"] > 0.99 and contrast["found"] == []
    assert page.value("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
