"""HTML and SVG as nested calls. Every string is escaped unless it came out of these functions."""

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def join(*children: Child) -> Html:
    """Children one after another; None is nothing, plain strings are escaped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(escape(str(child)))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def tag(name: str, *children: Child, **attributes: str | int | float | None) -> Html:
    """<name attributes>children</name>. class_ is class, stroke_width is stroke-width, a None attribute is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(coordinate(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def coordinate(value: str | int | float) -> str:
    """A number for an attribute, with at most two decimals: a page of curves is mostly coordinates."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def svg(width: float, height: float, *children: Child, label: str, class_: str | None = None, **more: str) -> Html:
    """A drawing that scales with its column; `label` is what a screen reader says."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=label,
        class_=class_,
        **more,
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None) -> Html:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def anchor(stage: str) -> str:
    """The id of a stage's section; the prefix keeps it apart from the page's own ids."""
    return "stage-" + "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in stage)


def clip(content: str, width: int) -> str:
    """At most `width` characters, so that labels keep to their place."""
    return content if len(content) <= width else content[: max(1, width - 1)] + "…"
