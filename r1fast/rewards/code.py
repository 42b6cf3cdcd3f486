"""Code reward: does the program in the answer pass the tests of its row?

The program is the last fenced block of Python in the answer part, else in the text after the reasoning, else in the
whole completion. Each test runs it in a process of its own that can do nothing but compute (sandbox.py); what a test
expects is compared outside (code_tests.py). A program reads its standard input, the standard library and installed
packages; it has no network, starts no processes and writes no files.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from r1fast.rewards.code_tests import CodeTest, passes, read_tests
from r1fast.rewards.fences import blocks
from r1fast.rewards.format import layout_rows
from r1fast.rewards.registry import reward
from r1fast.rewards.sandbox import CLOCK_LIMITS, Program, Sandbox, SandboxError

_COLUMNS = ("verification_info", "input_output", "test_list", "answer")
_SETUP = ("test_setup_code", "test_imports")  # of test_list
ALL_TESTS_LIMITS = 6.0  # time on the clock for all tests of a row, in limits of one test


def seconds_per_row(timeout_s: float = 5.0, **_: Any) -> float:
    """The longest that a row can take: the last test may begin just before the time for all is used up."""
    check_options(timeout_s=timeout_s)
    return (ALL_TESTS_LIMITS + CLOCK_LIMITS) * timeout_s


@reward("code", seconds_per_row=seconds_per_row)
def code(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    response_format: list[str] | str = "think_answer",
    prefilled: list[bool] | bool = False,
    partial: bool = False,
    timeout_s: float = 5.0,
    memory_gb: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """1.0 if all tests pass, 0.0 if one fails or there is no program, None where the row's tests cannot be read.

    The tests are in a row's verification_info, else its input_output, its test_list, or its answer (code_tests.py has
    the layouts).

    partial: pays the share of the tests that pass instead. timeout_s: processor time of one test; three times that on
    the clock, and six times that for all tests of a row. After a test that takes longer no other is run. memory_gb:
    address space of the program, Python's own 0.1 included.
    Raises SandboxError where this machine cannot confine programs.
    """
    check_options(timeout_s=timeout_s, memory_gb=memory_gb)
    values: list[float | None] = []
    for i, program in enumerate(find_programs(completions, response_format, prefilled)):
        try:
            tests = read_row({name: columns[name][i] for name in (*_COLUMNS, *_SETUP) if name in columns})
        except ValueError:
            values.append(None)
            continue
        passed = 0 if program is None else _num_passed(program, tests, partial, timeout_s, int(memory_gb * 2**30))
        values.append(passed / len(tests) if partial else float(passed == len(tests)))
    return values


def read_row(row: Mapping[str, Any]) -> list[CodeTest]:
    """Of its first column that holds something; ValueError with that column and what cannot be read."""
    if (name := next((name for name in _COLUMNS if row.get(name) is not None), None)) is None:
        raise ValueError(f"none of the columns {', '.join(_COLUMNS)} holds tests")
    try:
        return read_tests(dict(row) if name == "test_list" else row[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_options(*, timeout_s: float = 5.0, memory_gb: float = 1.0, **_: Any) -> None:
    """ValueError for a limit with which no program could run."""
    for name, value, least in (("timeout_s", timeout_s, 0.1), ("memory_gb", memory_gb, 0.25)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise ValueError(f"reward 'code': {name} is {value!r}, expected a number of at least {least}")


def find_programs(completions: list[str], response_format: Any, prefilled: Any) -> list[str | None]:
    """The program of each completion, or None. A block that is not closed was cut off, and is none."""
    programs = []
    for text, layout, opened in layout_rows(completions, response_format, prefilled):
        answer = layout.parse(text, prefilled=opened).answer
        parts = (answer or "", text.rpartition(layout.think_close)[2], text)
        programs.append(next((found for part in parts if (found := _last_block(part)) is not None), None))
    return programs


def _last_block(text: str) -> str | None:
    """Blocks without a tag, of output often, only where none has that of Python."""
    found = blocks(text)
    chosen = [block for block in found if block.is_python] or [block for block in found if not block.tag]
    return chosen[-1].program if chosen else None


def _num_passed(program: str, tests: Sequence[CodeTest], partial: bool, timeout_s: float, memory_bytes: int) -> int:
    end = time.monotonic() + ALL_TESTS_LIMITS * timeout_s
    passed = 0
    for test in tests:
        if time.monotonic() > end:
            break
        given, job = b"", Program(program, test.function, test.given, test.setup)
        if test.function is None:
            given, job = test.given.encode(errors="replace"), Program(program)
        try:
            ended = _sandbox().run(job, given, timeout_s=timeout_s, memory_bytes=memory_bytes)
        except SandboxError:
            _sandbox.cache_clear()  # it has closed itself; the next call starts another
            raise
        if not ended.fault and passes(test, ended.output):
            passed += 1
        elif not partial or ended.out_of_time:
            break
    return passed


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()
