"""Numbers as people read them, and the forms that a confidence interval may take."""

import math

import pytest

from r1fast.observe.formats import format_number, format_percent, format_seconds, interval, key_numbers, main_curve


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (60, "60"),
        (9999, "9999"),
        (228_416, "228k"),
        (999_999, "1000k"),  # rounds up across the suffix, still four figures
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


def test_interval_reads_a_pair_or_a_half_width() -> None:
    assert interval({"pass@1": 0.5, "pass@1_ci": [0.4, 0.6]}) == (0.4, 0.6)
    assert interval({"pass@1": 0.98, "pass@1_ci": 0.05}) == pytest.approx((0.93, 1.0))
    assert interval({"pass@1": 0.5}) is None
    assert interval({"pass@1_ci": [0.4, None]}) is None
    assert interval(None) is None


def test_key_numbers_take_the_first_name_that_has_a_finite_value() -> None:
    metrics = {"loss": 0.25, "rewards/accuracy/mean": math.nan, "accuracy": 0.5, "perf/throughput": 15_512.0}
    assert key_numbers(metrics) == [("accuracy", "0.5"), ("loss", "0.25"), ("tok/s", "15.5k")]
    assert main_curve(metrics) == "loss"
    assert main_curve({"reward": 1.0, "loss": 0.1}) == "reward"
    assert main_curve({}) is None
