"""Accuracy: which answers equal which golds, and where in a completion the answer may stand."""

import subprocess
import sys

import pytest

from r1fast.rewards.accuracy import Box, accuracy, last_box, plain_number, score_answer

RIGHT = [
    ("1,000", 1000),
    ("033", "33"),
    ("0.5", "1/2"),
    ("1/2", 0.5),
    ("14.", "14"),
    ("14.0", 14),
    ("−3", -3),
    ("x = -5", "-5"),
    ("it is 7-3", 3),
    ("2+3*4 = 14", "14"),
    ("1,000,000 people", "1000000"),
    ("$1{,}000$", "1000"),
    ("1e3", "1000"),
    ("答案是14。", "14"),
    ("Summary: The answer is 8.", "8"),
    (r"\boxed{5} no wait \boxed{7}", "7"),
    (r"\boxed{14} after 3 tries", "14"),
    (r"\boxed{12\text{ cm}}", "12"),
    (r"\boxed{x=5}", "5"),
    (r"The answer is $\frac{1}{2}$", "1/2"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{50\%}", r"50\%"),
    ("x+1", "1+x"),
    (r"$\{1,2\}$", r"\{2,1\}"),
    (r"\boxed{3\sqrt{2}}", r"$\sqrt{18}$"),
    ("B", "B"),
    ("(B)", "B"),
    ("**B**", "(B)"),
    ("The answer is (B) because of A.", "B"),
    (r"\boxed{\text{B}}", "B"),
    ("The answer is Paris.", "paris"),
    ("北京", "北京"),
    ("72", "48/2 = 24, 48+24 = 72\n#### 72"),
    ("7", r"so $3+4=7$, that is \boxed{7}"),
]
WRONG = [
    ("1,000", 1),
    ("5", "-5"),
    ("13", "14"),
    ("0.333", "1/3"),
    ("1/0", "1"),
    ("", "14"),
    ("no number", "14"),
    (r"\boxed{5} no wait \boxed{7}", "5"),
    (r"\boxed{14", "14"),
    (r"\boxed{}", "14"),
    (r"\boxed{9^{9^{9^9}}}", "7"),  # comparing it as a formula never ends
    (r"\boxed{1000000!}", "7"),
    ("A car is (B)", "A"),
    ("C", "B"),
    ("London", "Paris"),
    ("x+2", "1+x"),
]


@pytest.mark.parametrize(("final", "gold"), RIGHT)
def test_right_answers(final, gold):
    assert score_answer(final, gold) == 1.0


@pytest.mark.parametrize(("final", "gold"), WRONG)
def test_wrong_answers(final, gold):
    assert score_answer(final, gold) == 0.0


@pytest.mark.parametrize("gold", [None, "", "  ", "?", "###", r"\frac{", float("nan")])
def test_unreadable_gold_is_not_applicable_whatever_was_answered(gold):
    assert score_answer("14", gold) is None
    assert score_answer(str(gold), gold) is None
    assert score_answer(None, gold) is None


@pytest.mark.parametrize("gold", ["E", "I", "pi", r"\pi", "3:2"])
def test_gold_equals_itself(gold):
    assert score_answer(rf"\boxed{{{gold}}}", gold) == 1.0


def score(text, gold="14", **columns):
    return accuracy([""], [text], [[]], [gold], **columns)[0]


def test_accuracy_is_given_independently_of_format():
    assert score("<think>3*4=12</think><answer>14</answer>") == 1.0
    assert score("<think></think><answer>14</answer>") == 1.0
    assert score("hm <answer>14</answer> done") == 1.0
    assert score("<answer>13</answer><answer>14</answer>") == 1.0
    assert score("<answer>14</answer><answer>13</answer>") == 0.0
    assert score("<think>it is 14</think><answer></answer>") == 0.0
    assert score("<think>it is 14</think>", response_format="think_summary") == 0.0


def test_without_an_answer_part_only_lenient_scoring_pays():
    assert score("The answer is 14") == 0.0
    assert score("The answer is 14", strict=False) == 1.0
    assert score("<think>13</think> so 14", strict=False) == 1.0
    assert score("<think>14</think> so 13", strict=False) == 0.0


def test_truncated_completion_counts_only_if_its_answer_is_closed():
    cut = {"finish_reason": ["length"]}
    assert score("<think>hm</think><answer>14</answer>", **cut) == 1.0
    assert score("<think>hm</think><answer>14", **cut) == 0.0
    assert score("<think>hm</think><answer>14", finish_reason=["stop"]) == 1.0
    assert score("<think>hm</think>14", response_format=["think_summary"], **cut) == 0.0
    assert score("the answer is 14", strict=False, **cut) == 0.0


def test_rows_have_their_own_format_and_prefill():
    completions = ["<think>hm</think>14", "|special_token|hm|special_token|14", "hm</think><answer>14</answer>", "14"]
    formats = ["think_summary", "special_token", "think_answer", "think_answer"]
    values = accuracy(
        [""] * 4, completions, [[]] * 4, ["14", 14, "14", None], formats, prefilled=[False, False, True, False]
    )
    assert values == [1.0, 1.0, 1.0, None]


def test_last_box_balances_braces():
    assert last_box(r"\boxed{1} \boxed {\frac{1}{\{2\}}} end") == Box(r"\frac{1}{\{2\}}", True)
    assert last_box(r"\boxed{1} \boxed{\frac{1}{2}") == Box(None, False)
    assert last_box("none") == Box(None, True)


def test_plain_number_is_exact_and_bounded():
    assert plain_number("0.1") * 3 == plain_number("3/10")
    assert plain_number("9" * 5000) is None and plain_number("1e999999999") is None
    assert plain_number("1,00") is None and plain_number("1,2") is None and plain_number("x") is None


def test_plain_numbers_do_not_import_math_verify():
    code = (
        "import sys; from r1fast.rewards.accuracy import score_answer as s;"
        "assert s('it is 1,000', 1000) == 1.0 and s('B', 'B') == 1.0 and s('14 x', '14') == 1.0;"
        "assert not {'math_verify', 'torch', 'numpy', 'sympy'} & set(sys.modules), 'too much imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
