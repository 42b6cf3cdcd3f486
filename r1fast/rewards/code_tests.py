"""The tests of a coding task: reading them from a row, and comparing what a program gave with what they expect.

    {"language": "python", "test_cases": [{"type": "stdin_stdout", "input": text, "output": text},
                                          {"type": "function_call", "fn_name": name, "input": [..], "output": value}]}
    {"inputs": [..], "outputs": [..], "fn_name": name}        of APPS, TACO and LiveCodeBench; fn_name may be missing

the first as open-r1 has it. Each may be text, JSON or as Python writes it, at any level, and stand in `ground_truth`;
the cases may also be a list alone, or say testtype (stdin, functional) and metadata.func_name. Input and output of a
script are texts, or lists of lines. Input of a function is the list of its arguments, or a text with the JSON of one on
each line; its output may also be JSON text, or stand alone in a list: data sets have all of these.
"""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

TOLERANCE = 1e-6  # absolute, or relative above 1: what judges allow
_LANGUAGES = ("python", "python3", "py")
_TYPES = {"stdin_stdout": False, "stdin": False, "function_call": True, "functional": True}  # whether it has a name
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_INTEGER = re.compile(r"[+-]?[0-9]+")


class CodeTest(NamedTuple):
    """function None: `given` is the standard input and `expected` what is printed; else its arguments and its value."""

    function: str | None
    given: Any
    expected: Any


def read_tests(column: Any) -> list[CodeTest]:
    """At least one test, or ValueError with what cannot be read."""
    row = _plain(column)
    if isinstance(row, Mapping) and str(language := row.get("language") or "python").lower() not in _LANGUAGES:
        raise ValueError(f"language is {_shown(language)}, and only Python programs are run")
    tests = list(_tests(row))
    if not tests:
        raise ValueError("it holds no test")
    return tests


def _tests(row: Any) -> Iterator[CodeTest]:
    row = _plain(row)
    if isinstance(row, list) and all(isinstance(case, Mapping) for case in row):
        for i, case in enumerate(row):
            yield _typed_case(f"test_cases[{i}]", case)
    elif not isinstance(row, Mapping):
        raise ValueError(f"it is {_shown(row)}, expected an object with test_cases, or with inputs and outputs")
    elif name := next((name for name in ("test_cases", "ground_truth") if row.get(name) is not None), None):
        yield from _tests(row[name])
    elif not isinstance(inputs := row.get("inputs"), list) or not isinstance(outputs := row.get("outputs"), list):
        raise ValueError(f"its keys are {sorted(map(str, row))}, expected test_cases, or inputs and outputs")
    elif len(inputs) != len(outputs):
        raise ValueError(f"it has {len(inputs)} inputs and {len(outputs)} outputs")
    else:
        for i, (given, expected) in enumerate(zip(inputs, outputs)):
            yield _case(f"inputs[{i}]", row.get("fn_name") or None, given, expected)


def _typed_case(where: str, case: Mapping[str, Any]) -> CodeTest:
    metadata = case.get("metadata")
    function = case.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, Mapping) else None) or ""
    kind = case.get("type") or case.get("testtype") or ("function_call" if function else "stdin_stdout")
    if kind not in _TYPES:
        raise ValueError(f"{where}.type is {_shown(kind)}, expected one of {list(_TYPES)}")
    return _case(where, function if _TYPES[kind] else None, case.get("input"), case.get("output"))


def _case(where: str, function: str | None, given: Any, expected: Any) -> CodeTest:
    if function is None:
        return CodeTest(None, _lines(where, "input", given), _lines(where, "output", expected))
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"{where}: fn_name is {_shown(function)}, expected the name of a function")
    if isinstance(given, str):
        try:
            given = [json.loads(line) for line in given.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise ValueError(
                f"{where}: input is {_shown(given)}, expected the JSON of an argument on each line"
            ) from None
    if not isinstance(given, list):
        raise ValueError(f"{where}: input is {_shown(given)}, expected the list of arguments")
    return CodeTest(function, given, expected)


def _lines(where: str, name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_shown(value)}, expected text or a list of lines")
    return value


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise ValueError(f"it is {_shown(value)}, which is neither JSON nor a Python literal")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


# Comparing


def passes(test: CodeTest, output: bytes) -> bool:
    """Whether this is what the test expects of a program that has ended well.

    Printed: the same words on the same lines, blank lines and the width of white space aside. A number that is expected
    with a point or an exponent is met within TOLERANCE, an integer by its value (3 by 3.0), all else letter for letter.
    Returned: the same JSON, tuples being lists, with numbers as above.
    """
    try:
        if test.function is None:
            return _same_lines(output.decode(), test.expected)
        value = json.loads(output)
        return any(same_value(value, each) for each in _readings(test.expected, value))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        return False


def _same_lines(got: str, expected: str) -> bool:
    lines, wanted = ([words for line in text.splitlines() if (words := line.split())] for text in (got, expected))
    return len(lines) == len(wanted) and all(map(_same_words, lines, wanted))


def _same_words(line: Sequence[str], wanted: Sequence[str]) -> bool:
    return line == wanted or (len(line) == len(wanted) and all(map(_same_word, line, wanted)))


def _same_word(got: str, wanted: str) -> bool:
    if got == wanted:
        return True
    if not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(wanted)):
        return False
    if _INTEGER.fullmatch(wanted):
        return Decimal(got) == Decimal(wanted)
    return _close(float(got), float(wanted))


def _close(got: float, wanted: float) -> bool:
    return math.isclose(got, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _readings(expected: Any, value: Any) -> Iterator[Any]:
    """What an output may mean, see above; JSON text only where the function did not return a text."""
    yield expected
    if isinstance(expected, list) and len(expected) == 1:
        yield expected[0]
    if isinstance(expected, str) and not isinstance(value, str):
        yield json.loads(expected)


def same_value(got: Any, wanted: Any) -> bool:
    """Of JSON."""
    if isinstance(wanted, bool) or isinstance(got, bool):
        return got is wanted
    if isinstance(wanted, int | float) and isinstance(got, int | float):
        return got == wanted if isinstance(wanted, int) else got == wanted or _close(got, wanted)
    if isinstance(wanted, list) and isinstance(got, list):
        return len(got) == len(wanted) and all(map(same_value, got, wanted))
    if isinstance(wanted, dict) and isinstance(got, dict):
        return got.keys() == wanted.keys() and all(same_value(got[key], wanted[key]) for key in wanted)
    return type(got) is type(wanted) and bool(got == wanted)
