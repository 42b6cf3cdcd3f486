"""Language consistency: hand-counted ratios, with LaTeX, code and tags left out."""

import time

import pytest

from r1fast.rewards.language import language_consistency, language_ratio


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("first multiply then add", "en", 1.0),
        ("first multiply then add", "zh", 0.0),
        ("先乘后加", "zh", 1.0),
        ("先乘 then add", "zh", 2 / 4),
        ("先乘 then add", "en-US", 2 / 4),
        ("先乘, 设 x 为 $y + \\text{foo bar}$", "zh", 1.0),  # variables and formulas are no words
        ("we get \\[ \\text{结果} = 5 \\] here", "en", 1.0),
        ("we run ```python\n打印 = 1\n``` and `变量` here", "en", 1.0),
        ("<think>先算</think>", "zh", 1.0),
        ("结果 \\boxed{14} 和 \\frac{1}{2}", "zh", 1.0),
        ("costs $5\nand 他 has $10", "en", 3 / 4),  # a price opens no formula across lines
        ("don't naïve café", "fr", 1.0),
        ("сначала умножить then", "ru", 2 / 3),
        ("まず計算する", "ja", 1.0),
        ("まず計算する", "zh", 2 / 6),
        ("먼저 곱하고 add", "ko", 2 / 3),
        ("3*4=12, 2+12=14", "zh", 1.0),  # no words: nothing is mixed
        ("", "en", 1.0),
        ("The area is 4π so the angle θ is small", "en", 1.0),
        ("The area is 4π, and half of it is 2π, as asked.", "en", 1.0),
        ("三角形 ABC 中 sin 30 长 5 cm", "zh", 1.0),  # a label, a function, a unit
        ("面积 \\text{area of it} 与 \\mathrm{kg}", "zh", 1.0),
        ("costs $5 for one and $7 for two", "zh", 0.0),  # prose between prices, not a formula
        ("Ответ αβγ равен", "ru", 2 / 3),  # a word of Greek
        ("先乘后加然后得到答案", "ja", 0.0),  # Chinese: no kana
        ("計算", "ja", 1.0),  # too short to tell
        ("六边形 ABCDEF 中 y = ax + b, dx 与 sinx, 单位 (km/h)", "zh", 1.0),  # products of variables are no words
        ("\\texttt{name} 是 by and/or", "zh", 1 / 4),
        ("計算する、先に乗算", "ja", 1.0),
    ],
)
def test_ratio(text, language, expected):
    assert language_ratio(text, language) == pytest.approx(expected)


def test_reward_counts_the_reasoning_only():
    completions = [
        "<think>first 先</think><answer>答案 is 14</answer>",
        "<think>first step</think><answer>答案</answer>",
        "no tags 先乘",
        "<think>first step 先乘",
        "first step</think><answer>答案</answer>",
    ]
    values = language_consistency(
        [""] * 5, completions, [[]] * 5, language=["en", None, "en", "en", "en"], prefilled=[False] * 4 + [True]
    )
    assert values == [0.5, None, 0.5, 0.5, 1.0]


def test_without_the_column_it_does_not_apply():
    assert language_consistency(["", ""], ["a", "b"], [[], []]) == [None, None]


def test_unknown_language_is_an_error():
    with pytest.raises(ValueError, match="unknown language 'xx'"):
        language_ratio("text", "xx")


@pytest.mark.parametrize("piece", ["$a ", "\\text{", "`", "a'", "中", "<a"], ids=repr)
def test_hostile_text_is_linear(piece):
    start = time.process_time()
    language_ratio(piece * (100_000 // len(piece)), "en")
    assert time.process_time() - start < 5


def test_openings_that_never_close_stay_cheap():
    assert language_ratio("\\( word " * 4000, "en") == 1.0
