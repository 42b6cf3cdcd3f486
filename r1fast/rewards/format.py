"""Format reward: 1 where the whole completion is one well-formed response (v1 section 2.2.2), else 0."""

from typing import Any

from r1fast.data.templates import Parsed, get_response_format
from r1fast.rewards.registry import reward


@reward("format")
def format_reward(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    response_format: list[str] | str = "think_answer",
    prefilled: list[bool] | bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 if well formed, else 0.0. Text outside the tags, repeated or nested tags and empty reasoning all give 0."""
    return [float(parsed.well_formed) for parsed in parse_rows(completions, response_format, prefilled)]


def parse_rows(
    completions: list[str], response_format: list[str] | str, prefilled: list[bool] | bool = False
) -> list[Parsed]:
    """Parses each completion with its row's format."""
    columns = (per_row(column, len(completions)) for column in (response_format, prefilled))
    rows = zip(completions, *columns, strict=True)
    return [get_response_format(name).parse(text, prefilled=bool(opened)) for text, name, opened in rows]


def per_row(value: Any, num_rows: int) -> list[Any]:
    """A column as it is; a single value (an option from the recipe) once per row."""
    return list(value) if isinstance(value, list | tuple) else [value] * num_rows
