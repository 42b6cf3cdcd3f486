"""Partial credit for the layout: the share of the response format's tags that are there once, in any order."""

from collections import Counter
from typing import Any

from r1fast.data.templates import ResponseFormat
from r1fast.rewards.format import layout_rows
from r1fast.rewards.registry import reward


@reward("tag_count")
def tag_count(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    response_format: list[str] | str = "think_answer",
    prefilled: list[bool] | bool = False,
    **_: Any,
) -> list[float | None]:
    """1 / n for each of the n tags that the completion has to write, where it is there as often as it should be.

    A tag that the prompt ends with (`prefilled`) is none of them, and one that is repeated pays nothing. Tags around
    nothing are paid too, as in open-r1: `format` is what asks for a whole response.
    """
    return [_share(*row) for row in layout_rows(completions, response_format, prefilled)]


def _share(text: str, layout: ResponseFormat, prefilled: bool) -> float:
    tags = [tag for tag in (layout.think_open, layout.think_close, layout.answer_open, layout.answer_close) if tag]
    asked = Counter(tags[1:] if prefilled else tags)  # a format of one marker asks for it twice
    found = {tag: text.count(tag) for tag in asked}
    return sum(found[tag] for tag, times in asked.items() if found[tag] <= times) / asked.total()
