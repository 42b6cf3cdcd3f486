"""The house stays small and its plan true: sizes of files and functions, who imports whom (architecture, section 2)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import ROOT, SOURCES, imported, module_name

MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 600, 100, 8
# Their arguments are fixed from outside: launchers and operators by the kernel, public ops by who calls them (design:
# the ops take keywords), rewards by the columns of rows.
FREE_ARGUMENTS = {
    "decode_attention", "packed_attention", "packed_attention_reference", "route_topk", "route_topk_reference",
    "reasoning_gym", "cosine", "length",
}  # fmt: skip
PLAN = ROOT / "docs" / "architecture.md"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_of_a_kernel(function: ast.FunctionDef) -> bool:
    """Device code, or what launches it."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return "triton.jit" in decorators or "launch" in function.name or function.name == "_backward_kernel"


def test_no_file_is_long() -> None:
    files = [
        *SOURCES,
        *(ROOT / "csrc").rglob("*.cpp"),
        *(ROOT / "csrc").rglob("*.h"),
        *(ROOT / "r1fast").rglob("*.jinja"),
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_no_function_is_long_or_takes_much(path: Path) -> None:
    for function in functions(path):
        if is_of_a_kernel(function):
            continue
        where = f"{module_name(path)}.{function.name}"
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < MOST_FUNCTION_LINES, where
        taken = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        own = [argument for argument in taken if argument.arg not in ("self", "cls", "ctx")]
        assert len(own) <= MOST_ARGUMENTS or function.name in FREE_ARGUMENTS, where


def room_of(name: str) -> str | None:
    """A folder of r1fast, a file beside them, or the kernels."""
    parts = name.split(".")
    if parts[0] == "r1fast_kernels":
        return "r1fast_kernels"
    return parts[1] if parts[0] == "r1fast" and len(parts) > 1 else None


def plan() -> dict[str, list[str]]:
    modules = {module_name(path) for path in SOURCES}
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        room = room_of(module_name(path))
        if room is None or room == "r1fast_kernels":
            continue
        others = found.setdefault(room, set())
        for _, name in imported(path):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            others |= {other for other in [room_of(name)] if other not in (None, room)}
    return {room: sorted(others) for room, others in sorted(found.items())}


def test_the_plan_says_who_imports_whom() -> None:
    written = re.search(r"<!-- imports -->\n```\n(.*?)```", PLAN.read_text(encoding="utf-8"), re.DOTALL)
    assert written is not None
    found = "".join(f"{room:17}{' '.join(others) or '-'}\n" for room, others in plan().items())
    assert written[1] == found, f"write this into {PLAN.name}:\n{found}"


def test_no_two_rooms_import_each_other() -> None:
    rooms = plan()
    # A name that another room has too: the command line of one, the page of the other.
    both = [(a, b) for a, others in rooms.items() for b in others if a in rooms.get(b, []) and a < b]
    assert both == []
