"""The tests of a coding task: reading them from a row, and comparing what a program gave with what they expect.

    {"language": "python", "test_cases": [{"type": "stdin_stdout", "input": text, "output": text},
                                          {"type": "function_call", "fn_name": name, "input": [..], "output": value}]}
    {"inputs": [..], "outputs": [..], "fn_name": name}        of APPS, TACO and LiveCodeBench; fn_name may be missing
    {"test_list": ["assert f([1, 2]) == 3", ..], "test_imports": [..], "test_setup_code": text}             of MBPP

the first as open-r1 has it. Each may be text, JSON or as Python writes it, at any level, and stand in `ground_truth`;
the cases may also be a list alone, or say testtype (stdin, functional) and metadata.func_name. Input and output of a
script are texts, or lists of lines. Input of a function is the list of its arguments, or a text with the JSON of one on
each line; its output may also be JSON text, or stand alone in a list: data sets have all of these.

An assertion compares an expression with a literal. The program's process gets the expression alone, and the literal is
compared here like what a function returns: a program that redefines == or ends before the assert gains nothing.
"""

import ast
import builtins
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from r1fast.rewards.launcher import as_json

TOLERANCE = 1e-6  # absolute, or relative above 1: what judges allow
_LANGUAGES = ("python", "python3", "py")
_TYPES = {"stdin_stdout": False, "stdin": False, "function_call": True, "functional": True}  # whether it has a name
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_INTEGER = re.compile(r"[+-]?[0-9]+")


class CodeTest(NamedTuple):
    """function None: `given` is the standard input and `expected` what is printed; else its arguments and its value.

    given None: `function` is an expression, whose value is expected; `setup` comes between the program and it.
    """

    function: str | None
    given: Any
    expected: Any
    setup: str = ""


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
    elif isinstance(row, list) and all(isinstance(case, str) for case in row):
        yield from _assertions(row, "")
    elif isinstance(row, Mapping) and row.get("test_list") is not None:
        yield from _assertions(_plain(row["test_list"]), _setup(row))
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
            given = [_plain(line) for line in given.splitlines() if line.strip()]
        except ValueError:
            raise ValueError(
                f"{where}: input is {_shown(given)}, expected the JSON of an argument on each line"
            ) from None
        with contextlib.suppress(ValueError):  # some leave a text without its quotes
            expected = _plain(expected)
    if not isinstance(given, list):
        raise ValueError(f"{where}: input is {_shown(given)}, expected the list of arguments")
    return CodeTest(function, given, expected)


def _lines(where: str, name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_shown(value)}, expected text or a list of lines")
    return value


def _setup(row: Mapping[str, Any]) -> str:
    imports = _plain(row.get("test_imports") or [])
    lines = [row.get("test_setup_code") or "", *(imports if isinstance(imports, list) else [imports])]
    try:
        ast.parse(text := "\n".join(lines))
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(f"test_setup_code and test_imports are {_shown(lines)}, expected Python") from None
    return text


def _assertions(statements: Any, setup: str) -> Iterator[CodeTest]:
    if not isinstance(statements, list):
        raise ValueError(f"test_list is {_shown(statements)}, expected a list of assert statements")
    for i, text in enumerate(statements):
        try:
            found = [_assertion(statement) for statement in ast.parse(text.strip()).body]
        except (AttributeError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
            expected = "expected `assert EXPRESSION == LITERAL`, or a call that gives True or, after `not`, False"
            raise ValueError(f"assertion {i} is {_shown(text)}, {expected}") from None
        yield from (CodeTest(expression, None, value, setup) for expression, value in found)


def _assertion(statement: ast.stmt) -> tuple[str, Any]:
    """The expression and what its value has to be; ValueError, TypeError for an assertion of another form."""
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right])):
            if isinstance(left, ast.Constant):
                left, right = right, left
            return ast.unparse(left), json.loads(as_json(_literal(right)))
        case ast.Assert(test=ast.Call(func=ast.Attribute(attr="isclose") | ast.Name("isclose"), args=[left, right])):
            return ast.unparse(left), float(_literal(right))
        case ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call(func=ast.Name(name)) as call)):
            expected = False
        case ast.Assert(test=ast.Call(func=ast.Name(name)) as call):
            expected = True
        case _:
            raise ValueError
    if hasattr(builtins, name):  # all(..), any(..): what is expected would stand in the expression
        raise ValueError
    return f"bool({ast.unparse(call)})", expected


def _literal(node: ast.expr) -> Any:
    """set([1, 2]) and the like too."""
    known = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "float": float}
    match node:
        case ast.Call(func=ast.Name(name), args=args, keywords=[]) if name in known and len(args) < 2:
            return known[name](*map(_literal, args))
    return ast.literal_eval(node)


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value)
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return json.loads(json.dumps(ast.literal_eval(value)))  # with tuples as lists, as programs get them
    raise ValueError(f"it is {_shown(value)}, which is neither JSON nor a Python literal of what JSON has")


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
        readings = [test.expected] if test.given is None else _readings(test.expected, value)
        return any(same_value(value, each) for each in readings)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        return False


def _same_lines(got: str, expected: str) -> bool:
    if got.strip() == expected.strip():  # of a million lines in no time
        return True
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
        yield _plain(expected)


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
