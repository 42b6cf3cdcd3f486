"""The page in a real browser: nothing cut off or overflowing at any width, no complaint, search and zoom at work."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1fast.observe.comparison import build_comparison
from r1fast.observe.page import build_report
from tests.observe.browser import NAMES, Browser, find_browser
from tests.observe.conftest import make_long_run, make_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"needs a browser: one of {', '.join(NAMES)}")

# What a reader could not see: outside of the window, of its box, or of its drawing, or over each other.
PROBLEMS = """(() => {
  const found = [], page = document.documentElement;
  const name = one => `${one.tagName}.${one.className?.baseVal ?? one.className}: ${one.textContent.slice(0, 40)}`;
  const shown = one => one.checkVisibility({visibilityProperty: true});
  if (page.scrollWidth > innerWidth) found.push(`the page is ${page.scrollWidth} wide`);
  for (const one of document.querySelectorAll('body *')) {
    if (!shown(one) || one.closest('script, option, .scroll *')) continue;  // what scrolls
    const box = one.getBoundingClientRect(), style = getComputedStyle(one);
    if (box.right > innerWidth + 1 || box.left < -1) found.push(`outside of the window: ${name(one)}`);
    const clips = one instanceof HTMLElement && style.overflowX !== 'visible' && !one.matches('.scroll');
    if (clips && one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push(`cut off: ${name(one)}`);
    if (style.textOverflow === 'ellipsis') found.push(`ellipsis: ${name(one)}`);
    const svg = one.ownerSVGElement?.getBoundingClientRect();
    const outside = svg && (box.left < svg.left - 1 || box.right > svg.right + 1 || box.bottom > svg.bottom + 1);
    if (outside && one.tagName === 'text')
      found.push(`outside of the drawing: ${name(one)}`);
  }
  for (const axis of document.querySelectorAll('.axis')) {
    const boxes = [...axis.children].map(label => label.getBoundingClientRect());
    if (boxes.some((box, i) => i && box.left < boxes[i - 1].right)) found.push(`labels meet: ${axis.textContent}`);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a run as most are, of sixteen stages with long names, one at work, of both, and of what a kill left."""
    runs = {name: tmp_path_factory.mktemp(name) for name in ("whole", "long", "bare")}
    make_run(runs["whole"])
    make_long_run(runs["long"])
    for path in (make_long_run(runs["bare"]) / "summary.json", *runs["bare"].glob("*/stage.json")):
        path.unlink()
    both = build_comparison([runs["whole"], runs["long"]], runs["whole"] / "comparison.html")
    alone = {name: build_report(folder, live=name == "long") for name, folder in runs.items()}
    return {**alone, "both": both}


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["whole", "long", "both", "bare"])
def test_nothing_is_cut_off(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.open(pages[name], width)
    assert browser.run(PROBLEMS) == []
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.run(PROBLEMS) == []
    curves = "[...document.querySelectorAll('[data-curve]')]"
    assert browser.run(f"{curves}.length") > 80
    assert (
        browser.run(f"{curves}.filter(one => !one.querySelector('svg .curve') || /NaN/.test(one.innerHTML)).length")
        == 0
    )
    assert browser.errors == []


def figure(browser: Browser, place: str) -> dict[str, Any]:
    """The first curve of stage zero: its place in the window, and what it says."""
    browser.run(
        f"(window.one = document.querySelector('#stage-zero [data-curve={place}]')).scrollIntoView({{block: 'center'}})"
    )
    found: dict[str, Any] = browser.run(
        """(() => { const box = one.querySelector('svg').getBoundingClientRect();
        return {x: box.x, y: box.y, width: box.width, height: box.height, zoomed: one.dataset.zoomed,
                label: one.querySelector('svg').getAttribute('aria-label'),
                read: one.querySelector('b').textContent}; })()"""
    )
    return found


def test_zoom(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["whole"], 1400)
    chart = figure(browser, "reward")
    assert chart["zoomed"] == "false"
    left, right = (chart["x"] + chart["width"] * share for share in (0.4, 0.6))
    y = chart["y"] + chart["height"] / 2
    browser.mouse(
        ("mouseMoved", left, y), ("mousePressed", left, y), ("mouseMoved", right, y), ("mouseReleased", right, y)
    )
    zoomed = figure(browser, "reward")
    first, last = (int(word) for word in zoomed["label"].split(" ") if word.isdecimal())
    assert zoomed["zoomed"] == "true" and 15 < first < 30 < last < 45
    for clicks in (1, 2):
        browser.mouse(("mousePressed", left, y), ("mouseReleased", left, y), clicks=clicks)
    assert figure(browser, "reward")["zoomed"] == "false"

    browser.run("one.focus()")  # and by the keyboard
    for key in ("ArrowLeft", "+"):
        browser.key(key)
    assert figure(browser, "reward")["zoomed"] == "true"
    browser.key("Escape")
    browser.key("ArrowLeft")
    back = figure(browser, "reward")
    assert back["zoomed"] == "false" and back["read"].startswith("step 59: ")
    assert browser.errors == []


def test_search(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["whole"], 1400)
    shown = "document.querySelectorAll('.sample').length"
    said = "document.querySelector('.search output').textContent"
    total = int(browser.run(said).split(" of ")[1])
    assert browser.run(shown) == 12 and total > 50
    colours = "[...document.querySelectorAll('.chips b')].map(one => getComputedStyle(one).color)"
    assert len(set(browser.run(colours))) == 3  # text, and advantages of either sign
    browser.run("document.querySelector('.more').click()")
    assert browser.run(shown) == 24

    def ask(**values: str) -> int:
        for name, value in values.items():
            browser.run(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
                        f"(document.querySelector('.search').elements['{name}'])")  # fmt: skip
        return int(browser.run(said).split(" of ")[0])

    chinese = ask(text="先算")
    assert 0 < chinese < total and browser.run("document.querySelector('.sample mark').textContent") == "先算"
    assert browser.run("document.querySelector('.completion').textContent").startswith("<think> 先算 7 * 6")
    of_zero = ask(stage="zero")
    assert 0 < of_zero < chinese and 0 < ask(step="60") < of_zero and ask(text="no such text") == 0
    assert ask(text="", step="", low="1.5", high="1.8", order="best") > 0
    rewards = browser.run(
        "[...document.querySelectorAll('.sample')].map(one => Number(one.querySelector('b').textContent))"
    )
    assert rewards == sorted(rewards, reverse=True) and all(1.5 <= reward <= 1.8 for reward in rewards)
    browser.open(pages["whole"], 1400)  # what was asked for is asked for again, as a page that reloads itself must
    assert browser.run("document.querySelector('.search').elements.stage.value") == "zero"
    browser.run("sessionStorage.clear()")
    assert browser.errors == []


def test_the_menu_leads_to_every_stage(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"], 390)
    browser.run("document.querySelector('.menu summary').click()")
    assert (
        browser.run("[...document.querySelectorAll('.menu a')].filter(one => document.querySelector(one.hash)).length")
        == 14
    )
    assert browser.run(PROBLEMS) == []
    browser.run("[...document.querySelectorAll('.menu a')].at(-1).click()")
    assert browser.run("scrollY") > 1000 and not browser.run("document.querySelector('.menu').open")
    assert browser.errors == []


def test_the_page_of_a_killed_run_says_that_it_is_old(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    page, said = tmp_path / "report.html", "document.querySelector('.notice').textContent"
    source = pages["long"].read_text()
    page.write_text(re.sub('data-written="[0-9]+"', f'data-written="{int(time.time()) - 3600}"', source))
    browser.open(page, 1400)
    assert "Nothing has been written for 60 minutes" in browser.run(said)
    browser.open(pages["long"], 1400)
    assert "Nothing has been written" not in browser.run(said) and browser.errors == []


def test_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        browser.open(pages["whole"], 1400, scheme)
        colours[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == colours["light"] != colours["dark"]
