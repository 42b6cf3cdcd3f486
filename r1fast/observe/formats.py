"""How numbers are written, on the console and on the page; the metrics a person wants to see first."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

# Label -> metric names that carry it, best first. TRL's names, then verl's, then short ones.
KEY_METRICS: dict[str, tuple[str, ...]] = {
    "reward": ("reward",),
    "accuracy": ("rewards/accuracy/mean", "accuracy"),
    "language": ("rewards/language/mean", "language"),
    "loss": ("loss",),
    "kl": ("kl",),
    "length": ("completions/mean_length",),
    "lr": ("learning_rate", "lr"),
    "tok/s": ("perf/throughput", "tokens_per_second", "tok/s"),
}


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (bool excluded)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_number(value: Any) -> str:
    """Three significant digits, thousands as k, M, G: 0.0012, 5e-4, 21.3, 18.2k."""
    if not is_number(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    size = abs(value)
    if isinstance(value, int) and size < 10_000:
        return str(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.3g}{suffix}" if abs(scaled) < 999.5 else f"{scaled:.0f}{suffix}"
    if size >= 999.5:
        return f"{value:.0f}"
    if size >= 1e-3 or size == 0:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_percent(value: Any, digits: int = 1) -> str:
    """A share of one, as a percentage without the sign: 0.791 -> 79.1."""
    return f"{100 * value:.{digits}f}" if is_number(value) else "–"


def format_seconds(seconds: Any) -> str:
    """3.4 s, 4 m 12 s, 1 h 03 m."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"


def score(evaluation: Mapping[str, Any] | None, key: str) -> float | None:
    """One finite number of an evaluation, or None."""
    value = (evaluation or {}).get(key)
    return float(value) if is_number(value) else None


def interval(evaluation: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The confidence interval of pass@1 as (low, high); stored as such a pair, or as a half-width."""
    value, mean = (evaluation or {}).get("pass@1_ci"), score(evaluation, "pass@1")
    if isinstance(value, list | tuple) and len(value) == 2 and all(is_number(end) for end in value):
        return float(value[0]), float(value[1])
    if is_number(value) and mean is not None:
        return max(0.0, mean - value), min(1.0, mean + value)
    return None


def losses(evaluation: Mapping[str, Any] | None) -> list[str]:
    """What stands beside the scores of an evaluation: how much of it is not the model's doing. Empty: nothing."""
    named = (("failures", "samples with a failed reward (scored 0)"), ("unscorable", "prompts without a readable gold"))
    counts = [(int(score(evaluation, key) or 0), words) for key, words in named]
    return [f"{count} {words}" for count, words in counts if count]


def short_name(name: str) -> str:
    """The last part of a Hub id or a path: charts have little room."""
    return name.rstrip("/").rpartition("/")[2] or name


def key_numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The key metrics that are present, as (label, text), in reading order."""
    found = []
    for label, names in KEY_METRICS.items():
        value = next((metrics[name] for name in names if is_number(metrics.get(name))), None)
        if value is not None:
            found.append((label, format_number(value)))
    return found


def main_curve(metrics: Mapping[str, Any]) -> str | None:
    """The metric whose curve tells how the stage is going: the reward, else the loss."""
    return next((name for name in ("reward", "loss") if is_number(metrics.get(name))), None)
