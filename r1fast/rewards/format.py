"""Layout rewards: `format`, one well-formed response (v1 section 2.2.2), and `completeness`, one that is done."""

from collections.abc import Iterator
from typing import Any

from r1fast.data.templates import Parsed, ResponseFormat, get_response_format
from r1fast.rewards.answers import last_box
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


@reward("completeness")
def completeness(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    finish_reason: list[str] | str,
    response_format: list[str] | str = "think_answer",
    prefilled: list[bool] | bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 if the finish reason is "stop", the format holds (so the summary is not empty) and no \\boxed stays open."""
    rows = parse_rows(completions, response_format, prefilled)
    reasons = per_row(finish_reason, len(completions))
    return [
        float(reason == "stop" and parsed.well_formed and last_box(parsed.answer or "").closed)
        for parsed, reason in zip(rows, reasons, strict=True)
    ]


def parse_rows(
    completions: list[str], response_format: list[str] | str, prefilled: list[bool] | bool = False
) -> list[Parsed]:
    """Parses each completion with its row's format."""
    rows = layout_rows(completions, response_format, prefilled)
    return [layout.parse(text, prefilled=opened) for text, layout, opened in rows]


def layout_rows(
    completions: list[str], response_format: list[str] | str, prefilled: list[bool] | bool
) -> Iterator[tuple[str, ResponseFormat, bool]]:
    """Each completion with its row's format, and whether its prompt opens the reasoning."""
    columns = (per_row(column, len(completions)) for column in (response_format, prefilled))
    for text, name, opened in zip(completions, *columns, strict=True):
        yield text, get_response_format(name), bool(opened)


def per_row(value: Any, num_rows: int) -> list[Any]:
    """A column as it is; a single value (an option from the recipe) once per row."""
    return list(value) if isinstance(value, list | tuple) else [value] * num_rows
