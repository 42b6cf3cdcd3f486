"""Numbers as people read them."""

import math

import pytest

from r1fast.observe.formats import format_bytes, format_number, format_percent, format_seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (60, "60"),
        (9999, "9999"),
        (228_416, "228k"),
        (999_999, "1000k"),  # rounds up across the suffix, still four figures
        (1e299, "1e299"),
        (10**400, str(10**400)),
        (2_310_144, "2.31M"),
        (15_512.7, "15.5k"),
        (5e-4, "5e-4"),
        (1.25e-7, "1.2e-7"),
        (-0.00243, "-0.00243"),
        (21.34, "21.3"),
        (math.nan, "–"),
        (None, "–"),
        (True, "True"),
    ],
)
def test_format_number(value: object, expected: str) -> None:
    assert format_number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3.44, "3.4 s"), (59.97, "60.0 s"), (252, "4 m 12 s"), (3780, "1 h 03 m"), (None, "–")]
)
def test_format_seconds(seconds: float | None, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_format_percent_of_a_missing_score_is_a_dash() -> None:
    assert format_percent(0.7914) == "79.1"
    assert format_percent(None) == format_percent(math.nan) == "–"


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (512_400_000, 999_600_000, 14e9, None)] == ["512 MB", "1 GB", "14 GB", "–"]
