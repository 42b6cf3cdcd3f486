"""How numbers are written, on the console and on the page, and what is read of an evaluation."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

LARGEST = 1e300  # of a number that is shown: sums and distances of some must be numbers too
_FIRST = ("pass@1", "pass@k", "cons@k", "greedy")
_NO_SHARES = {  # of an evaluation
    "pass@1_ci", "n", "k", "split", "temperature", "top_p", "length", "failures", "unscorable", "files", "step",
}  # fmt: skip


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (bool excluded)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def format_number(value: Any) -> str:
    """Three significant digits, thousands as k, M, G: 0.0012, 5e-4, 21.3, 18.2k."""
    if not is_number(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    size = abs(value)
    if size < 10_000 and isinstance(value, int):
        return str(value)
    if 0 < size < 1e-3 or size >= 1e12:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size < 10_000:
        return f"{value:.3g}" if size < 999.5 else f"{value:.0f}"
    scale, suffix = (1e3, "k") if size < 1e6 else (1e6, "M") if size < 1e9 else (1e9, "G")
    return f"{value / scale:.3g}{suffix}" if size < 999.5 * scale else f"{value / scale:.0f}{suffix}"


def format_percent(value: Any) -> str:
    """A share of one, as a percentage without the sign: 0.791 -> 79.1."""
    return f"{100 * value:.1f}" if is_number(value) else "–"


def format_seconds(seconds: Any) -> str:
    """3.4 s, 4 m 12 s, 1 h 03 m."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def score(evaluation: Mapping[str, Any] | None, key: str) -> float | None:
    """One finite number of an evaluation, or None."""
    value = (evaluation or {}).get(key)
    return float(value) if is_number(value) else None


def shares(evaluations: Iterable[Mapping[str, Any]]) -> list[str]:
    """What evaluations measure as shares of one: accuracy in its ways, then the other rewards."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation if name not in _NO_SHARES)
    return [*(name for name in _FIRST if name in names), *(name for name in names if name not in _FIRST)]


def interval(evaluation: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The confidence interval of pass@1 as (low, high), from its half-width."""
    half, mean = score(evaluation, "pass@1_ci"), score(evaluation, "pass@1")
    return None if half is None or mean is None else (max(0.0, mean - half), min(1.0, mean + half))


def losses(evaluation: Mapping[str, Any] | None) -> list[str]:
    """What stands beside the scores of an evaluation: how much of it is not the model's doing. Empty: nothing."""
    named = (("failures", "samples with a failed reward (scored 0)"), ("unscorable", "prompts without a readable gold"))
    counts = [(int(score(evaluation, key) or 0), words) for key, words in named]
    return [f"{count} {words}" for count, words in counts if count]
