"""Repetition penalty against hand-counted n-grams."""

import pytest

from r1fast.rewards.repetition import repetition, repetition_ratio


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("a b c d", 3, 0.0),
        ("a b a b a b", 2, 1 - 2 / 5),  # ab ba ab ba ab
        ("A b a B", 2, 1 - 2 / 3),  # case does not count
        ("a b", 3, 0.0),
        ("", 1, 0.0),
        ("先乘先乘", 2, 1 - 2 / 3),  # a character is a word
        ("x先y先", 1, 1 - 3 / 4),
        ("2+3=5 2+3=5", 5, 1 - 5 / 6),
    ],
)
def test_ratio(text, ngram, expected):
    assert repetition_ratio(text, ngram) == pytest.approx(expected)


def test_reward_is_never_positive():
    values = repetition([""] * 2, ["a b c d", "a b " * 100], [[]] * 2, ngram=2, max_penalty=-0.5)
    assert values[0] == 0.0 and -0.5 < values[1] < -0.49


def test_bad_options():
    with pytest.raises(ValueError, match="max_penalty must be <= 0"):
        repetition([""], ["a"], [[]], max_penalty=1.0)
    with pytest.raises(ValueError, match="ngram must be >= 1"):
        repetition([""], ["a"], [[]], ngram=0)
