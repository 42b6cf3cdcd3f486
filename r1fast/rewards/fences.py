"""Fenced blocks of Markdown, as models write them.

A fence is three or more ` or ~, and one at least as long closes the block: on a line of its own, with what follows a
program on the same line (```</answer>), or at the end of the program's last line. A block within a list is indented,
and its lines with it; a fence that is indented further (in the docstring of a program, say) is part of the program.
Time is linear in the text.
"""

import re
from typing import NamedTuple

_ITEM = re.compile(r"[ \t]*(?:[-*+]|[0-9]{1,9}[.)])[ \t]+")
_PYTHON = re.compile(r"[{.]*(?:python|pypy|py)[0-9.]*(?![\w+#-])", re.IGNORECASE)
_FURTHER = 3  # columns by which a closing fence may be indented more than the opening one


class Block(NamedTuple):
    """tag: what stands after the opening fence. program: with the line breaks of its lines."""

    tag: str
    program: str

    @property
    def is_python(self) -> bool:
        return _PYTHON.match(self.tag) is not None


class _Opening(NamedTuple):
    indent: str
    fence: str
    tag: str


def blocks(text: str) -> list[Block]:
    """In their order. One that is not closed was cut off, and is none."""
    found: list[Block] = []
    opening: _Opening | None = None
    program: list[str] = []
    for line in text.split("\n"):
        if opening is None:
            opening, program = _opening(line), []
            continue
        rest = _after_fence(line, opening)
        if rest is not None and re.match(r"[\w{.]", rest):  # another begins, so this one was given up
            opening, program = _Opening(opening.indent, opening.fence, rest.strip()), []
        elif rest is not None or _ends_with_fence(line, opening.fence):
            last = [] if rest is not None else [line.rstrip().rstrip(opening.fence[0])]
            lines = [line.removeprefix(opening.indent) for line in program + last]
            found.append(Block(opening.tag, "\n".join(lines if last else [*lines, ""]) if lines else ""))
            opening = None
        else:
            program.append(line)
    return found


def _opening(line: str) -> _Opening | None:
    """The fence that opens a block here. After other text than a list's item it must say that Python follows."""
    bare = line.lstrip(" \t")
    if bare.startswith("~~~"):
        before, tag = line[: len(line) - len(bare)], bare.lstrip("~")
        fence = bare[: len(bare) - len(tag)]
    else:
        head, found, tag = line.rpartition("```")
        before = head.rstrip("`")
        fence = line[len(before) : len(head)] + found
        if not found or "`" in tag:
            return None
    tag = tag.strip()
    if before.strip(" \t") and not _ITEM.fullmatch(before):
        indent = line[: len(line) - len(bare)]
        return _Opening(indent, fence, tag) if _PYTHON.match(tag) else None
    return _Opening(re.sub(r"[^\t]", " ", before), fence, tag)


def _after_fence(line: str, opening: _Opening) -> str | None:
    """What follows a fence that begins the line; None where there is none that could close the block."""
    bare = line.lstrip(" \t")
    is_within = len(line) - len(bare) <= len(opening.indent) + _FURTHER
    return bare.lstrip(opening.fence[0]) if is_within and bare.startswith(opening.fence) else None


def _ends_with_fence(line: str, fence: str) -> bool:
    """After something else, and it is the only one there: a text in quotes may hold two."""
    line = line.rstrip()
    before = line.rstrip(fence[0])
    return line.endswith(fence) and before.strip() != "" and fence[:3] not in before
