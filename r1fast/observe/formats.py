"""How numbers are written, on the console and on the page."""

from typing import Any, TypeGuard

LARGEST = 1e300  # of a number that is shown: sums and distances of some must be numbers too


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


def format_bytes(count: Any) -> str:
    """512 MB, 1.4 GB, in powers of 1000."""
    if not is_number(count):
        return "–"
    return f"{count / 1e6:.0f} MB" if count < 999.5e6 else f"{count / 1e9:.3g} GB"


def plural(count: int, noun: str) -> str:
    """1 prompt, 1,200 prompts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
