"""Completeness reward: the response ended by itself, is well formed, and its last box is closed."""

from typing import Any

from r1fast.rewards.accuracy import last_box
from r1fast.rewards.format import parse_rows, per_row
from r1fast.rewards.registry import reward


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
