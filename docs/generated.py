"""What the site holds beside the pages of docs/ (a hook of mkdocs): every option, from the schema; the names of other
trainers; files of the repository's root."""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from r1fast.explain import OptionText, heading, options_of  # noqa: E402
from r1fast.schema import KINDS  # noqa: E402
from r1fast.translations import translations, values  # noqa: E402

COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # a page, and the file that it is
OPTIONS = "options.md"  # of a recipe; those of a kind of stage are in options/KIND.md
WIDE = "---\nhide: [toc]\n---\n\n"


def on_files(files: Files, config: Any) -> Files:
    made = {page: (ROOT / name).read_text(encoding="utf-8") for page, name in COPIED.items()}
    for page, content in {**made, **option_pages()}.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository lead out of docs/, or into it from its root; a marker stands for a table."""
    for page, name in COPIED.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}", f"]({page}", markdown)
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = markdown.replace("<!-- values -->", values_there())
    return re.sub(r"<!-- names of (.+?) -->", lambda found: names_of(found[1]), markdown)


def option_pages() -> dict[str, str]:
    """Every option of every stage and section, as Markdown by page."""
    kinds = "\n".join(f"- [`{kind}`](options/{kind}.md): {escaped(heading(kind))}" for kind in KINDS)
    told = "Made from the schema; `python -m r1fast.train --help grpo` prints the same. Names are TRL's or verl's."
    pages = {OPTIONS: f"{WIDE}# Options\n\n{told}\n\n## Of a stage\n\n{kinds}\n\n## Of a recipe\n\n{tables('recipe')}"}
    for kind in KINDS:
        text = f"{escaped(heading(kind))} What it does: [Stages](../stages.md#{kind})."
        pages[f"options/{kind}.md"] = f"{WIDE}# Options of {kind}\n\n{text}\n\n{tables(kind)}"
    return pages


def tables(topic: str) -> str:
    """A table for each group of options."""
    parts = []
    for group, options in groupby(options_of(topic), key=lambda option: option.group):
        title = "" if group == heading(topic) else f"**{escaped(group)}**\n\n"
        rows = [(named(x), escaped(x.type), escaped(x.default), escaped(x.about)) for x in options]
        parts.append(title + table(("option", "is", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def named(option: OptionText) -> str:
    return f'<code id="{option.name}">{option.name}</code>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def names_of(peer: str) -> str:
    """What another trainer calls things, and what they are here."""
    places = dict(option_places())
    rows = [
        (f"`{row.theirs}`", ", ".join(linked(name, places) for name in row.ours) or "nothing", escaped(row.note))
        for row in translations()
        if row.peer == peer
    ]
    if not rows:
        raise ValueError(f"no names of {peer!r}; expected one of {sorted({row.peer for row in translations()})}")
    return table((peer, "here", ""), rows)


def values_there() -> str:
    """Values that other trainers have, and what they are here."""
    places = dict(option_places())
    rows = [(linked(option, places), f"`{theirs}`", escaped(ours)) for option, theirs, ours in values()]
    return table(("option", "there", "here"), rows)


def option_places() -> Iterator[tuple[str, str]]:
    """Where each option is explained; of those that several stages have, with GRPO's."""
    for kind in [kind for kind in KINDS if kind != "grpo"] + ["grpo"]:
        yield from ((option.name, f"options/{kind}.md#{option.name}") for option in options_of(kind))
    yield from ((option.name, f"{OPTIONS}#{option.name}") for option in options_of("recipe"))


def linked(name: str, places: dict[str, str]) -> str:
    return f"[`{name}`]({places[name]})" if name in places else f"`{name}`"


def escaped(text: str) -> str:
    """As Markdown in a cell of a table; what stands between ` is code already."""
    said = [re.sub(r"[|<>*\[\]]", lambda found: f"&#{ord(found[0])};", part) for part in text.split("`")]
    said[1::2] = [part.replace("|", "\\|") for part in text.split("`")[1::2]]
    return "`".join(said)
