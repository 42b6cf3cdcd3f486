"""What errors say, in the same words everywhere."""

from collections.abc import Iterable
from difflib import get_close_matches


def one_line(error: BaseException) -> str:
    """The kind of an exception and its text."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest known names, or an empty string."""
    near = get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
