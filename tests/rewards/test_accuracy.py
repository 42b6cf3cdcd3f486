"""Accuracy: which answers equal which golds, and where in a completion the answer may stand."""

import random
import subprocess
import sys
import time

import pytest

from r1fast.rewards.accuracy import accuracy, read_gold, score_answer
from r1fast.rewards.answers import Box, last_box, plain_number

RIGHT = [
    ("1,000", 1000),
    ("033", "33"),
    ("0.5", "1/2"),
    ("1/2", 0.5),
    ("0.3", 0.1 + 0.2),
    ("10^{22}", 1e22),
    ("true", True),
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


# By rule: final answer, gold, score.
RULES = {
    "two numbers with a space between are no product": [
        ("31/2", "3 1/2", 0), ("3 1/2", "31/2", 0), ("8 3", "83", 0), ("2, 500", "2,500", 0), (r"\frac 1 2", "1/2", 1),
        ("3 1/2", "1/2", 0), ("2 1/2", "2.5", 1), ("7 3/4", "7.75", 1), ("-4 4/9", "-40/9", 1), ("11 7/6", "77/6", 0),
        ("The answer is 4 4/9.", "4", 0), ("1 000", "1000", 1), ("8 2 5", "5 8 2", 0), ("2 3", "6", 0), ("2 3", "5", 0),
        (r"918\frac{1}{2}", "918.5", 1), ("11\n5/6", "71/6", 0),
    ],
    "values are equal if they are equal": [
        (r"\frac{12}{3}", r"\frac{1}{23}", 0), ("2^{n-1}", "2^n-1", 0), (r"\sqrt{x}+1", r"\sqrt{x+1}", 0),
        (r"\frac18", r"12.5\%", 1), (r"10^{20}", r"\sqrt{10^{40}+1}", 0), ("g(x)", "f(x)", 0), ("f(y)", "f(x)", 0),
        ("f(x)", "f'(x)", 0), (r"1,2,\ldots,n", r"1,2,\ldots,n", 1), ("1,2,n", r"1,2,\ldots,n", 0),
        (r"\boxed{\frac{1}{1803!}}", r"\frac{1}{1801!}", 0), (r"\boxed{1.1\times 10^{-23}}", r"8.2\times 10^{-31}", 0),
        (r"\frac{100}{3}", "33.3", 0), ("0.333333", "1/3", 1), ("0.333334", "1/3", 0),
        (r"\sqrt{17}", "4.123105625617661", 1),
        ("35%", "0.35", 1), (r"\boxed{35\%}", "0.35", 1), ("28", r"28\%", 1), ("28", "0.28", 0), ("28/100", "28", 0),
        (r"40\pi", "125.66", 0), ("3.0e8", r"3\cdot 10^8", 1), ("5 million", "5000000", 1),
        (r"2^{1000}", r"2^{1000}+1", 0),
        (r"\sin 30^\circ", r"\frac12", 1), (r"\binom{5}{2}", "10", 1), ("1,22", "1.22", 1), ("811", "11", 0),
    ],
    "text is no arithmetic": [
        ("192.168.0.0/16", "192.168.0.0/24", 0), (r"O\,H_2", "H_2O", 0),
        (r"\text{CH}_3\text{OH}", "CH_3OH", 1),
        ("5:30PM", "5:30 p.m.", 1), ("5:30 PM", "5:30", 0), ("CaOH2", "Ca(OH)_2", 0), ("Ca(OH)2", "Ca(OH)_2", 1),
        ("1/6", "2/3/4", 0), ("2024-01-15", "2024-01-15", 1), ("2031-08-11", "2031-07-12", 0), ("21:45", "14:30", 0),
        (r"\boxed{0.1}", "3:30", 0), ("It is 21:45.", "21:45", 1), ("0x3f2c", "0xb715", 0), ("0X3F2C", "0x3f2c", 1),
        ("-0x1f", "-0x2f", 0), ("0b11", "0b101", 0), ("192.168.0.1", "192.168.1.0", 0), ("555-1234", "555-1243", 0),
        ("(555) 123-4567", "(555) 123-4567", 1), ("Put ring 3 from A to C", "Put ring C from A to 3", 0),
        ("1 2\n3 4", "1  2\n3 4", 1), ("1 2 3 4", "1 2\n3 4", 0), ("8a0", "3a0", 0), ("C6H6", "C6H6", 1),
        ("C6H6", "6", 0),
        ("7*y**2 - 3", "5*y**2 - 3", 0), ("7*y**2 - 3", "7y^2-3", 1),
    ],
    "a number base is part of the value": [
        ("101", r"101_{\text{two}}", 0), (r"101_{\text{three}}", r"101_{\text{two}}", 0),
        ("101_2", r"(101)_{\text{two}}", 1),
        (r"\boxed{101_{\text{2}}}", "101_2", 1), ("19_8", "19", 0),
        (r"\boxed{101_3}", "101_2", 0), ("101_{2}", "101_2", 1), ("101", "101_2", 0), ("5", "101_2", 0),
        ("so it is $204_5$.", "204_5", 1), ("101_2", "101", 0),
    ],
    "one expression is read as such, and prose is not searched inside one": [
        ("The answer is not 5", "5", 0), ("It is not 5 but 8", "8", 1), (r"It is \textbf{7}.", "7", 1),
        ("38 m^2", "38", 1), ("The area is 36 cm^2.", "36", 1), ("2^10", "10", 0), ("2^10", "1024", 1), ("x^2", "2", 0),
        ("sqrt(25)", "25", 0), ("sqrt(25)", "5", 1), ("3^9", "9", 0), ("[0,9)", "9", 0), ("The set is [0,9)", "9", 0),
        ("C6H6", "6", 0), ("AZYUK2A", "2", 0), (r"$31{,}250$", "31250", 1), (r"$31{,}250$", "250", 0),
        (r"So, 5 \times 9 = 45", "45", 1), (r"It costs 5 \ and then 7", "7", 1),
        ("therefore 353 g - 79 g = 274 g", "274", 1),
        ("word " * 3000 + "so it is $x^2+1$", "1+x^2", 1), ("costs $5 and not $7", "7", 1),
        ("Answer: Ann will pay 220 $ in 12 months.", "220", 1), ("3 or 5", "5", 0),
    ],
    "what is written in several ways": [
        (r"\tan^{-1} 2", r"\arctan 2", 1), (r"{4 \choose 2}", "6", 1), ("1.5 x 10^3", "1500", 1),
        ("1/2", r"\int_0^1 x dx", 1), ("[0, infinity)", r"[0,\infty)", 1), ("5 miles per hour", "5 mph", 1),
        ("５", "5", 1), (r"\boxed{12\,500}", "12500", 1), ("12 500", "12500", 1), (r"11,\! 111,\! 100", "11111100", 1),
        ("–3", "-3", 1), ("½", "0.5", 1), ("2½", "5/2", 1), ("√25", "5", 1), ("x²+1", "x^2+1", 1),
        ("2√3", r"\sqrt{12}", 1),
        ("π/2", r"\frac{\pi}{2}", 1), ("90°", r"90^\circ", 1),
        (r"\boxed{1-\frac{1}{\mathrm{e}}}", r"1-\frac{1}{\mathrm{e}}", 1),
        (r"\boxed{2+3\mathrm{i}}", "2+3i", 1), (r"\sqrt3", r"\sqrt{3}", 1), (r"\dfrac12", r"\frac{1}{2}", 1),
    ],
    "an unknown operator and a false equation are no answer": [
        (r"\boxed{n = 2 \cdot 6 = 10}", "10", 0),
        (r"\boxed{8 ? 3}", "3", 0), (r"\boxed{8 @ 3}", "3", 0), (r"\boxed{3?}", "3", 0), (r"\boxed{x = 8 = 3}", "3", 0),
        (r"\boxed{x = 1 + 2 = 3}", "3", 1), (r"\boxed{3 \ldots}", "3", 0),
        (r"\boxed{8 \mid 3}", "3", 0), (r"\boxed{8 = 3}", "3", 0), (r"\boxed{5 \times 9 = 45}", "45", 1),
        (r"\boxed{x = 3}", "3", 1), (r"\boxed{a^2+3b = 0}", "0", 0), (r"\boxed{8 > 3}", "3", 0),
        ("f(x) = 2x + 3", "y = 2x+3", 1),
    ],
    "boxes joined by commas, and, or are one list": [
        (r"\boxed{3}, \boxed{8}", "8", 0), (r"\boxed{3}, \boxed{8}", "8, 3", 1),
        (r"\boxed{3} and \boxed{8}", r"\{3,8\}", 1),
        (r"first \boxed{615}, and again: \boxed{615}", "615", 1), ("3, 8", r"\boxed{3} or \boxed{8}", 1),
        (r"\boxed{1} papers and \boxed{2} bins", "1,2", 1), (r"\boxed{5}, but rather \boxed{7}", "7", 1),
    ],
    "lists, tuples, intervals": [
        ("2, 1", "x_1=1, x_2=2", 1),
        ("2, 1", "x=1, y=2", 0), ("1, 2", "x=1, y=2", 1), ("2, 1", "x=1, x=2", 1), ("3>x>1", "1<x<3", 1),
        ("x<0 or x>1", r"(-\infty,0)\cup(1,\infty)", 1), ("x<0 or x>2", r"(-\infty,0)\cup(1,\infty)", 0),
        ("2,1", "1,2", 1),
        (r"\boxed{\emptyset}", r"\{\}", 1), ("(2,1)", "(1,2)", 0), (r"\boxed{[0,1]}", "[0,1)", 0),
        ("(1,4.5)", r"(1,\frac{9}{2})", 1),
        (r"\boxed{x<7}", r"(-\infty,7)", 1), (r"x \ge 3", r"[3,\infty)", 1), ("2, 2, 3", "2, 3", 0),
        ("4, 5", "AB=4,CD=5", 1),
        (r"\{1-\sqrt5, 1+\sqrt5\}", r"1\pm\sqrt{5}", 1), (r"2021", r"\pm 2021", 0),
        ("(5,2),(7,2)", "p=5,q=2;p=7,q=2", 1),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", 1),
    ],
    "equations": [
        (r"\boxed{4x+2y-6=0}", "2x+y-3=0", 1), ("x=11", "y=11", 0), ("-x > -1", "x < 1", 1), ("x > -1", "x < 1", 0),
        (r"\sin(x)=\frac{42}{59}", r"\cos(x)=\frac{42}{59}", 0),
    ],
    "choices": [
        ("Neither A nor B", "B", 0), ("I do not think it is B", "B", 0), ("选B不选A", "B", 1),
        ("The answer is not B", "B", 0), ("A (not B)", "B", 0), ("不选B", "B", 0), ("Option B is wrong", "B", 0),
        ("not A, so B", "B", 1), ("A B", "B", 0), ("A/B", "B", 0), ("20 °C", "C", 0),
        ("The answer is B, I think", "B", 1),
        (r"\boxed{\text{Option B}}", "B", 1), ("0.5", r"\textbf{(B)}\ \frac{1}{2}", 1), ("*B*", "B", 1),
        (r"\boxed{\textbf{(C)}}", "C", 1), (r"\boxed{C}", r"\textbf{(C)}\ 17", 1),
        (r"\boxed{17}", r"\textbf{(C)}\ 17", 1),
        (r"\boxed{B}", r"\textbf{(C)}\ 17", 0), ("A or C", "C", 0), (r"\boxed{A, B}", "A", 0),
        ("The answer is A or B", "A", 0),
        ("The correct answer is D, since the others fail", "D", 1),
        ("Option D is correct", "D", 1), ("故选D。", "D", 1),
        (r"\boxed{\textbf{(D)}\ 48}", "D", 1), ("**C**", "C", 1), (r"\boxed{\mathrm{B}}", "(B) 12", 1),
        ("A dog", "A", 0),
        ("The answer is Apple", "A", 0), ("B. it cannot be A", "B", 1), (r"\boxed{BD}", "B, D", 1),
    ],
    "golds": [
        ("1072", "He pays.\n#### 1,072", 1), ("40+2=42\n#### 42\nThere were 3 steps.", "42", 1), ("7", ["5", "7"], 1),
        ("6", ["5", "7"], 0), ("7", [None, "7"], 1), ("5 cm", "5 m", 0), ("5", "5 m", 1),
        ("5 centimeters", r"5\text{ cm}", 1),
        (r"12\text{ ways}", "12", 1), ("The midpoints meet", "the  midpoints meet", 1),
    ],
    "size": [
        (r"\boxed{(x+1)^{9999}}", "x+1", 0), (r"\boxed{9!!!!!!!!}", "5", 0), (r"\boxed{10^{10^{10}}}", "7", 0),
        (r"\boxed{\binom{10^9}{10^8}}", "7", 0), (r"\boxed{2^{2^{2^{2^{2^2}}}}}", "x+1", 0),
    ],
}  # fmt: skip
CASES = [(rule, *case) for rule, cases in RULES.items() for case in cases]


@pytest.mark.parametrize(("rule", "final", "gold", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_rules(rule, final, gold, expected):
    assert score_answer(final, gold) == expected


NO_GOLD = [
    "nan",
    "N/A",
    "None",
    "null",
    {"target": 24},
    [],
    [None, "nan"],
    "It follows by induction on the vertices",
    "We see that by Lemma 3 it holds",
]


@pytest.mark.parametrize("gold", NO_GOLD, ids=repr)
def test_what_cannot_be_read_is_no_gold(gold):
    assert score_answer("5", gold) is None
    assert score_answer(str(gold), gold) is None


def generated_golds(count: int) -> list[str]:
    rng = random.Random(0)
    n = lambda: rng.randint(2, 98)  # noqa: E731
    shapes = [
        lambda: str(n()), lambda: f"-{n()}.{n()}", lambda: f"\\frac{{{n()}}}{{{n()}}}",
        lambda: f"{n()},{rng.randint(100, 999)}",
        lambda: f"{n()}\\sqrt{{{n()}}}", lambda: f"x^{n()}+{n()}x", lambda: f"({n()}, {n()}]",
        lambda: f"\\{{{n()}, {n()}+a\\}}",
        lambda: f"{n()}:{rng.randint(10, 59)}",
        lambda: f"20{rng.randint(10, 29)}-0{rng.randint(1, 9)}-{rng.randint(10, 28)}",
        lambda: f"0x{rng.randint(4096, 65535):x}", lambda: f"{n()} {n()} {n()}", lambda: f"{n()}0_{rng.randint(2, 9)}",
        lambda: f"y = {n()}x - {n()}", lambda: f"x > {n()}", lambda: f"{n()}\\text{{ cm}}", lambda: f"{n()}\\%",
        lambda: rng.choice("ABCDE"), lambda: rng.choice(["north", "Paris", "no solution", "北京"]),
        lambda: f"\\pm {n()}",
    ]  # fmt: skip
    return [rng.choice(shapes)() for _ in range(count)]


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_gold_equals_itself_boxed_or_not_and_no_other_digits(count):
    rng = random.Random(1)
    for gold in generated_golds(count):
        assert score_answer(gold, gold) == 1.0, gold
        assert score_answer(f"So \\boxed{{{gold}}}.", gold) == 1.0, gold
        digits = [index for index, char in enumerate(gold) if char.isdigit()]
        if digits:
            index = rng.choice(digits)
            other = gold[:index] + str((int(gold[index]) + rng.randint(1, 8)) % 10) + gold[index + 1 :]
            same = plain_number(other) is not None and plain_number(other) == plain_number(gold)
            assert score_answer(f"\\boxed{{{other}}}", gold) == float(same), (other, gold)


def test_text_golds_equal_no_other():
    golds = sorted({gold for gold in generated_golds(250) if (kind := read_gold(gold)) and kind.kind == "text"})
    assert len(golds) > 30
    assert all(score_answer(other, gold) == 0.0 for gold in golds for other in golds if other != gold)


HOSTILE = [
    "\\boxed{",
    "\\boxed{1},",
    "$1 ",
    "\\( ",
    "(",
    "1,",
    "1 ",
    "-",
    "**",
    "A or ",
    "0x1 ",
    "\n",
    "\\text{",
    "√",
    "5 cm/",
    "{",
]


@pytest.mark.parametrize("piece", HOSTILE, ids=repr)
def test_hostile_text_costs_no_more_than_its_length(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for gold in ("5", "C", "21:45", "x+1"):
        assert score_answer(text, gold) == 0.0 or (piece == "5 cm/" and gold == "5")
        score_answer(f"\\boxed{{{text}}}", gold)
    score_answer("5", text)
    assert time.process_time() - start < 20  # about 1 s; what is quadratic in 100,000 characters takes minutes


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
