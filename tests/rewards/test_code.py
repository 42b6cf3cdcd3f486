"""The reward `code`: which text is the program, which tests a row has, what passes, and what it is worth."""

import json
from typing import Any

import numpy as np
import pytest

from r1fast.rewards.code import check_options, code, find_programs, read_row, seconds_per_row
from r1fast.rewards.code_tests import CodeTest, passes, read_tests, same_value
from r1fast.rewards.pool import RewardPool

ADDS = "print(sum(map(int, input().split())))"


def case(given: str, expected: str) -> dict[str, Any]:
    return {"input": given, "output": expected, "type": "stdin_stdout"}


SUMS = {"language": "python", "test_cases": [case("1 2\n", "3\n"), case("5 6\n", "11"), case("-1 1\n", "0\n")]}


def fenced(program: str, tag: str = "python") -> str:
    return f"```{tag}\n{program}\n```"


def answered(program: str) -> str:
    return f"<think>a thought</think>\n<answer>\nHere it is:\n{fenced(program)}\n</answer>"


def score(completions: list[str], info: Any = SUMS, **options: Any) -> list[float | None]:
    columns = {"verification_info": [info] * len(completions)} | options
    return code([""] * len(completions), completions, [[]] * len(completions), **columns)


def test_all_tests_or_none_or_a_share() -> None:
    positive_only = "a, b = map(int, input().split())\nprint(a + b if a > 0 else 7)"
    crashes_late = "a, b = map(int, input().split())\nprint(a + b)\nassert a > 0"
    completions = [answered(ADDS), answered(positive_only), answered(crashes_late), answered("print(3)"), "no program"]
    assert score(completions) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(completions, partial=True) == [1.0, 2 / 3, 2 / 3, 1 / 3, 0.0]
    assert score(completions[:1], json.dumps(SUMS)) == [1.0]


def test_a_test_that_runs_out_of_time_is_the_last() -> None:
    slow_first = "a = input()\nwhile a == '1 2': pass\nprint(sum(map(int, a.split())))"
    assert score([answered(slow_first)], partial=True, timeout_s=0.2) == [0.0]
    slow_last = "a = input()\nwhile a == '-1 1': pass\nprint(sum(map(int, a.split())))"
    assert score([answered(slow_last)], partial=True, timeout_s=0.2) == [2 / 3]


def test_function_calls() -> None:
    info = {
        "language": "python",
        "test_cases": [
            {"fn_name": "swap", "input": [1, [2]], "output": [[2], 1], "type": "function_call"},
            {"fn_name": "swap", "input": ["a", None], "output": [None, "a"]},
        ],
    }
    assert score([answered("def swap(a, b): return b, a"), answered("def swap(a, b): return [a, b]")], info) == [
        1.0,
        0.0,
    ]
    taco = {"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2]], "outputs": [[3], [0.3]]}
    live = {"fn_name": "add", "inputs": ["1\n2", "[1]\n[2]"], "outputs": ["3", "[1, 2]"]}
    solution = answered("class Solution:\n    def add(self, a: List[int], b): return a + b")
    assert score([solution], taco) == score([solution], live) == [1.0]
    assert code([""], [solution], [[]], input_output=[json.dumps(live)]) == [1.0]
    assert code([""], [solution], [[]], answer=[json.dumps(taco)], verification_info=[None]) == [1.0]


@pytest.mark.parametrize(
    ("info", "why"),
    [
        (None, "it is NoneType None, expected an object"),
        ("7", "expected an object with test_cases"),
        ("{broken", "which is neither JSON nor a Python literal"),
        ({}, r"its keys are \[\], expected test_cases, or inputs and outputs"),
        ({"language": "cpp", "test_cases": [case("", "")]}, "language is str 'cpp', and only Python programs are run"),
        ({"test_cases": []}, "it holds no test"),
        ({"inputs": [], "outputs": []}, "it holds no test"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"test_cases": "[1]"}, r"it is list \[1\], expected an object with test_cases"),
        ({"test_cases": {"inputs": 3}}, r"its keys are \['inputs'\], expected test_cases, or inputs and outputs"),
        ("print(1)", "neither JSON nor a Python literal"),
        ("(" * 10**5, "neither JSON nor a Python literal"),
        ({"test_cases": [case("", ""), {"type": "shell"}]}, r"test_cases\[1\].type is str 'shell', expected one of"),
        ({"test_cases": [{"input": "", "output": None}]}, r"test_cases\[0\]: output is NoneType None"),
        ({"test_cases": [{"input": 3, "output": "3"}]}, "input is int 3, expected text or a list of lines"),
        ({"test_cases": [{"type": "function_call", "input": [], "output": 1}]}, "fn_name is str ''"),
        ({"inputs": ["{1"], "outputs": [1], "fn_name": "f"}, "expected the JSON of an argument on each line"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "expected the list of arguments"),
    ],
)
def test_rows_that_cannot_be_read_are_not_scored(info: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_tests(info)
    assert score([answered(ADDS)], info) == [None]


def test_rows_without_tests() -> None:
    with pytest.raises(
        ValueError, match="none of the columns verification_info, input_output, test_list, answer holds"
    ):
        read_row({"answer": None})
    with pytest.raises(ValueError, match="answer: it is str 'x=3', which is neither JSON"):
        read_row({"answer": "x=3"})
    assert code(["", ""], [answered(ADDS)] * 2, [[], []]) == [None, None]


def test_lists_of_lines_and_missing_languages() -> None:
    assert read_tests({"inputs": [["1", "2"]], "outputs": [["3"]]}) == [CodeTest(None, "1\n2", "3")]
    assert read_tests({"language": None, "test_cases": json.dumps([{"input": "1", "output": "2"}])})[0].given == "1"


@pytest.mark.parametrize(
    "column",
    [
        repr({"language": "python", "test_cases": [{"type": "stdin_stdout", "input": "1", "output": "2"}]}),
        {"ground_truth": json.dumps([{"type": "stdin_stdout", "input": "1", "output": "2"}]), "dataset_type": "x"},
        {"test_cases": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
        json.dumps([{"testtype": "stdin", "input": "1", "output": "2"}]),
    ],
    ids=["python", "ground-truth", "inputs-inside", "testtype"],
)
def test_layouts_of_data_sets(column: Any) -> None:
    assert read_tests(column) == [CodeTest(None, "1", "2")]


def test_functions_of_livecodebench() -> None:
    row = [{"testtype": "functional", "metadata": {"func_name": "f"}, "input": "[1]\n2", "output": "3"}]
    assert read_tests(row) == [CodeTest("f", [[1], 2], 3)]


@pytest.mark.parametrize(
    ("given", "expected", "program"),
    [
        ('"ab"\n2', '"abab"', "def f(x, n): return x * n"),  # texts of LiveCodeBench stand in quotes
        ('"ab"\n2', "abab", "def f(x, n): return x * n"),
        ("[True, None]\n1", "[None, True]", "def f(x, n): return x[::-1]"),
        ([[1, 2]], [2, 4], "import numpy as np\ndef f(x): return np.array(x) * 2"),
        ([[1, 2]], 3, "import numpy as np\ndef f(x): return np.sum(x)"),
    ],
)
def test_values_as_data_sets_write_them_and_numpy_returns_them(given: Any, expected: Any, program: str) -> None:
    assert score([answered(program)], {"inputs": [given], "outputs": [expected], "fn_name": "f"}) == [1.0]


SETUP = {"test_setup_code": "three = 3", "test_imports": ["import numpy as np", "from math import floor"]}
ONES = "class Y:\n    def __eq__(self, other): return True\ndef f(a): return Y()"


@pytest.mark.parametrize(
    ("program", "tests", "value"),
    [
        ("def f(a, b): return a + b", ["assert f(1, 2)==3", "assert f((1,), (2,)) == (1, 2), 'why'"], 1.0),
        ("def f(a): return a - 1", ["assert f(three) == 2\nassert 3 == f(4)", "assert f(np.sum([1])) == 0"], 1.0),
        ("def f(a): return a", ["assert set(f([3, 1])) == set([1, 3])", "assert f({2}) == {2}"], 1.0),
        ("def f(a): return sorted(a)", ["assert f({2}) == {2}"], 0.0),
        ("def f(a): return {a: (1, 2)}", ["assert f(1) == {1: (1, 2)}", "assert f(2) == {1: (1, 2)}"], 0.5),
        ("def f(a): return a > 3", ["assert f(4)", "assert not f(3)", "assert f(3) is False"], 1.0),
        ("def f(r): return 3.141592653589793 * r", ["assert math.isclose(f(2), 6.28318530718, rel_tol=0.01)"], 1.0),
        ("def f(a): return 3", ["assert f(0) == [3]"], 0.0),
        ("def f(a): pass", ["assert all(f(i) is None for i in range(3))"], None),
        ("def f(a): pass", ["assert f(3) == three"], None),
        ("def f(a): pass", ["assert f(3) == 1j"], None),
        ("def f(a): pass", ["f(3)"], None),
        ("def f(a): pass", [3], None),
        ("def f(a): pass", "assert f(3) == 3", None),
        (ONES, ["assert f(3) == 3"], 0.0),
        ("import sys\ndef f(a): sys.exit(0)", ["assert f(3) == 3"], 0.0),
        ("import math\nmath.isclose = lambda *a, **k: True\ndef f(a): return 0", ["assert math.isclose(f(3), 3)"], 0.0),
        ("bool = lambda x: True\ndef f(a): return False", ["assert not f(3)"], 0.0),
    ],
)
def test_assertions_of_mbpp(program: str, tests: Any, value: float | None) -> None:
    columns: dict[str, Any] = {"test_list": [tests]} | {name: [given] for name, given in SETUP.items()}
    assert code([""], [answered(program)], [[]], partial=True, **columns) == [value]


def test_imports_of_a_csv_file_and_those_that_are_no_python() -> None:
    row = {"test_list": "['assert f(floor(1.5)) == 1']", "test_imports": "['from math import floor']"}
    assert read_tests(row) == [CodeTest("f(floor(1.5))", None, 1, "\nfrom math import floor")]
    for wrong in ({"test_imports": ["import"]}, {"test_setup_code": 3}):
        with pytest.raises(ValueError, match=r"test_setup_code and test_imports are list .*, expected Python"):
            read_tests(row | wrong)


def test_assertions_in_verification_info() -> None:
    """As AceCode has them."""
    assert score([answered("def f(a): return a")], {"test_cases": ["assert f(3) == 3"]}) == [1.0]


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        ("3\n", "3", True),
        ("3\n", "3\n\n \n", True),
        ("1 2\n3\n", "  1   2 \r\n3", True),
        ("1 2\n3\n", "1\n2 3\n", False),
        ("1\n2\n", "1\n", False),  # nothing that is left out is right
        ("", "1", False),
        ("", "\n", True),
        ("1\n", "", False),
        ("YES", "yes", False),
        ("3", "3.0", True),
        ("3", "3.0000001", False),
        ("10000000000000001", "1e16", False),
        ("0.333333333333", "0.333333", True),
        ("0.33", "0.34", False),
        ("1000000.5", "1000000.6", True),
        ("0.5 a", "0.5 b", False),
        ("0.0", "-0.0000001", True),
        ("1.0", "nan", False),
        ("nan", "NaN", False),
        ("1.0", "1e9999", False),
        ("1e309", "1e309", True),
        ("1.5", "1_5", False),
        ("12", "١٢", False),
    ],
)
def test_printed(expected: str, output: str, same: bool) -> None:
    assert passes(CodeTest(None, "", expected), output.encode()) == same


def test_printed_bytes_that_are_no_text() -> None:
    assert not passes(CodeTest(None, "", "\ufffd"), b"\xff")


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        (1, True, False),
        (True, True, True),
        (1, 1.0, True),
        (0.3, 0.1 + 0.2, True),
        ([0.3, [1]], [0.30000000000000004, [1]], True),
        ([1], [1, 1], False),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ("a", 1, False),
        (None, 0, False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), False),
        (10**20, 10**20 + 1, False),
    ],
)
def test_returned(wanted: Any, got: Any, same: bool) -> None:
    assert same_value(got, wanted) is same
    assert passes(CodeTest("f", [], wanted), json.dumps(got).encode()) == same


def test_returned_text_that_is_no_value() -> None:
    for output in (b"", b"[" * 10**5, b"{", b"NaN", b'"\\ud800"'):
        assert not passes(CodeTest("f", [], [1]), output)
    assert not passes(CodeTest("f", [], "3 apples"), b"3")


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (fenced("1"), "1\n"),
        (fenced("1", "py"), "1\n"),
        (fenced("1", "Python3"), "1\n"),
        (fenced("1", "python title=x"), "1\n"),
        (fenced("1", ""), "1\n"),
        (fenced("1", "cpp"), None),
        (fenced("1") + "\n" + fenced("2"), "2\n"),
        (fenced("1") + "\nOutput:\n" + fenced("2", ""), "1\n"),
        (fenced("1") + "\n```python\n2", "1\n"),
        ("```python\n1```", "1"),
        ("```python\n1", None),
        ("print(1)", None),
        ("", None),
        (f"<think>{fenced('1')}</think><answer>{fenced('2')}</answer>{fenced('3')}", "2\n"),
        (f"<think>{fenced('1')}</think>{fenced('2')}", "2\n"),
        (f"<think>{fenced('1')}</think><answer>none</answer>", "1\n"),
        ("`" * 10**5, None),
        ("```" + "a" * 10**5 + "`", None),
        ("```" + " " * 10**5 + "`", None),
        ("```python\n" * 10**4, None),
        (("```python" + " " * 100) * 10**3, None),
        ("~~~python\n1\n~~~", "1\n"),
        ("````python\n```\n````", "```\n"),
        ("````markdown\n```python\n1\n```\n````", None),
        ("1. So:\n\n   ```python\n   if 1:\n     2\n   ```\n", "if 1:\n  2\n"),
        ("- ```python\n  1\n  ```", "1\n"),
        ("\t```python\n\t1\n\t```", "1\n"),
        ("So: ```python\n1\n```", "1\n"),
        ("Write ```\n1\n``` or not", None),
        ("```python\r\n1\r\n```\r\n", "1\r\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ('```python\ns = """\n    ```python\n    ```"""\n```', 's = """\n    ```python\n    ```"""\n'),
        ("```python\n1\n```</answer> and ```cpp\n2\n```", "1\n"),
        ("```python\n1\n```python\n2\n```", "2\n"),
        ("```{.python .numberLines}\n1\n```", "1\n"),
        ("```python:main.py\n1\n```", "1\n"),
        ("```pypy3.10\n1\n```", "1\n"),
        ("```python-repl\n1\n```", None),
        ("```python\n```", ""),
    ],
)
def test_the_last_block_is_the_program(completion: str, program: str | None) -> None:
    (found,) = find_programs([completion], "think_answer", False)
    assert found == program


def test_options() -> None:
    for options in ({"timeout_s": 0}, {"timeout_s": "5"}, {"memory_gb": 0.01}, {"timeout_s": float("nan")}):
        with pytest.raises(ValueError, match=f"reward 'code': {next(iter(options))} is"):
            check_options(**options)
    with pytest.raises(ValueError, match="timeout_s is -1"):
        RewardPool({"code": {"timeout_s": -1}})
    assert seconds_per_row(timeout_s=2.0) == 18.0


def test_in_the_pool_programs_that_hang_cost_only_themselves() -> None:
    """Together they take longer than a call may: the reward itself keeps to a time for each row."""
    hangs, good = answered("while True: pass"), answered(ADDS)
    completions = [hangs, good, hangs, good, hangs, "```python\nimport os; os.kill(os.getppid(), 9)\n```", good, hangs]
    infos = [SUMS] * 7 + [{"language": "java"}]
    with RewardPool({"code": {"timeout_s": 0.2}, "format": {}}, timeout_s=0.5) as pool:
        result = pool.score([""] * 8, completions, [[1]] * 8, {"verification_info": infos})
    np.testing.assert_equal(result.values["code"], [0, 1, 0, 1, 0, 0, 1, np.nan])
    assert not result.failed.any() and not result.exceeded["code"].any() and result.failures == []


# What went wrong elsewhere


def test_output_is_compared_whatever_ends_its_lines() -> None:
    """open-r1 687 and 504: every score 0, and lines compared with the white space at their ends."""
    info = {"language": "python", "test_cases": [case("3\n", "1 \n2\t\n3\n")]}
    assert score([answered("for i in range(int(input())): print(i + 1)")], info) == [1.0]


def test_a_function_that_raises_does_not_return_nothing() -> None:
    """verl 7853: an error inside the call was printed as nothing, which an expected "" or null then met."""
    raises = answered("def f(x): raise ValueError")
    for expected in ("", None, [], [None]):
        assert score([raises], {"inputs": [[1]], "outputs": [expected], "fn_name": "f"}) == [0.0]
    assert score([answered("def f(x): return None")], {"inputs": [[1]], "outputs": [None], "fn_name": "f"}) == [1.0]


@pytest.mark.parametrize(
    "program",
    [
        "def f(*a): return None\n@(lambda f: (lambda candidate: None))",
        "def f(x):\n    class Yes:\n        def __eq__(self, other): return True\n    return Yes()",
        "import json\njson.loads = json.dumps = lambda *a, **k: '1'\ndef f(x): return 1",
        "def check(candidate): return True\ndef f(x): return 1",
        "import sys\nsys.exit(0)",
    ],
)
def test_nothing_of_the_check_is_within_reach(program: str) -> None:
    """NeMo-Gym 3153: a decorator on the last line took over the check; here the program is compiled alone."""
    assert score([answered(program)], {"inputs": [[20]], "outputs": [[40]], "fn_name": "f"}) == [0.0]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(1 / 3)", "0.333333"),
        ("import sys; sys.stdout.buffer.write(b'1\\n')", "1"),
        ("print(10 ** 5000 // 10 ** 4999)\nprint(len(str(10 ** 5000)))", "10\n5001"),
    ],
)
def test_right_programs_that_graders_have_failed(program: str, expected: str) -> None:
    """NeMo-Gym 2956: digits of fractions, bytes to the standard output, integers of more than 4300 digits."""
    assert score([answered(program)], {"test_cases": [case("", expected)]}) == [1.0]
