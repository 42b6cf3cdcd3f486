"""README and the pages of docs/: their headings, links and fenced blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment before a block says why it is not run here, or only parsed.
_BLOCK = re.compile(
    r"(?:^<!-- (?P<limit>not run|parsed only): (?P<why>[^>]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_NAME = re.compile(r"# ([\w-]+\.(?:yaml|py))\n")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    limit: str  # "", "not run" or "parsed only"

    @property
    def name(self) -> str | None:
        """Of the file that it is, as its first line says."""
        found = _NAME.match(self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("text")), found["language"], found["text"], found["limit"] or "")
        for found in _BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> list[str]:
    """Of its headings, as the site names them; of two of a name the site numbers the second."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
