"""The site builds and opens from files; every link leads somewhere, every option, stage and reward has its place."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from r1fast.explain import options_of
from r1fast.rewards import registry
from r1fast.schema import KINDS
from r1fast.translations import translations
from tests.docs.pages import PAGES, ROOT, anchors, links, prose
from tests.observe.browser import Browser, find_browser


@pytest.fixture(scope="module")
def site(made_once) -> Path:
    """Built with --strict: a link or an anchor that leads nowhere is an error."""

    def build(folder: Path) -> None:
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))

    return made_once("site", build)


class Sources(HTMLParser):
    """What a browser loads for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found += [source] if (source := values.get("src")) else []
        elif tag == "link":
            self.found.append(values["href"] or "")


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]  # a server's, with its paths
    assert len(pages) > 20
    for page in pages:
        sources = Sources()
        sources.feed(page.read_text(encoding="utf-8"))
        assert any(source.endswith("iframe-worker.js") for source in sources.found)  # the search, opened as a file
        for source in sources.found:
            assert (page.parent / source).is_file(), f"{page.name}: {source}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.skipif(find_browser() is None, reason="needs a browser")
def test_pages_fit_and_are_searched_as_files(site: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        for page in ("index.html", "troubleshooting.html", "options/grpo.html", "coming-from.html"):
            for width in (390, 1400):
                browser.open(site / page, width)
                assert browser.run("document.documentElement.scrollWidth <= innerWidth"), (page, width)
        browser.run(SEARCH.format(words="overlong_buffer_length"))
        assert "Options of grpo" in browser.run(FOUND)
        assert browser.errors == []


SEARCH = """
const box = document.querySelector('.md-search__input');
box.focus(); box.value = '{words}'; box.dispatchEvent(new Event('keyup'));
"""
FOUND = """new Promise(async (done, failed) => {
  const results = document.querySelector('.md-search-result__list');
  for (let i = 0; i < 200 && !results.textContent; i++) await new Promise(later => setTimeout(later, 50));
  done(results.textContent);
})"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    """In the repository, as they are read there; made pages are followed on the site."""
    for link in links(page):
        place, _, anchor = link.partition("#")
        if re.match("https?://", link) or place == "contributing.md" or place.startswith("options"):
            continue
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_headings_of_a_page_differ(page: Path) -> None:
    found = anchors(page)
    assert found and sorted(set(found)) == sorted(found)


def test_every_option_is_on_its_page(site: Path) -> None:
    for kind in (*KINDS, "recipe"):
        page = site / ("options.html" if kind == "recipe" else f"options/{kind}.html")
        ids = set(re.findall(r'<code id="([^"]+)"', page.read_text(encoding="utf-8")))
        assert ids == {option.name for option in options_of(kind)}
        assert ids >= ({"seed", "stages"} if kind == "recipe" else {"name", "kind", "model"})


def test_every_name_of_another_trainer_is_on_the_page(site: Path) -> None:
    page = (site / "coming-from.html").read_text(encoding="utf-8")
    cells = set(re.findall(r"<td><code>([^<]+)</code></td>", page))
    assert {row.theirs for row in translations()} <= cells
    assert page.count('href="options/grpo.html#') > 20


@pytest.mark.parametrize(
    ("page", "names"),
    [("stages.md", sorted(KINDS)), ("rewards.md", None)],
    ids=["stages", "rewards"],
)
def test_every_stage_and_reward_has_its_section(page: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(ValueError, match="unknown reward"):
            registry.resolve("none")  # reads the modules
        names = sorted(name for name, f in registry.REWARDS.items() if registry.is_builtin(f))
    text = prose(ROOT / "docs" / page)
    for name in names:
        assert f"\n## {name}\n" in text, name
        assert f"[`{name}`](#{name})" in text, f"{name}: not in the table"
