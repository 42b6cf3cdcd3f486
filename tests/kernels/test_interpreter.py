"""Every Triton kernel, checked without a GPU: the tests that take a backend, in processes that interpret Triton.

What they do in memory is checked too (checked_memory.py). Triton decides at import whether it compiles or interprets,
hence processes of their own, of one thread.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from r1fast_kernels import dispatch
from tests.forks import Forks

HERE = Path(__file__).parent
FILES = {"decode_layers": "decode_parts"}  # where an op's tests in Triton have one of their own
# Ops that have Triton kernels; linear ops drive those of selective_logprobs.
OPS = [op for op, exists in dispatch.IMPLEMENTATIONS.items() if "triton" in exists and op != "linear_cross_entropy"]
OF_THE_INTERPRETER = ["checked_memory", "sampling_passes", "wide_offsets"]  # what conftest.py collects there alone

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="this is the interpreter's process")


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Forks]:
    modules = ("pytest", "hypothesis", "tests.kernels.moe", "tests.kernels.heads", "tests.kernels.checked_memory")
    with Forks(*modules, TRITON_INTERPRET="1") as forks:
        yield forks


def interpret(interpreters: Forks, op: str, lane: str, folder: Path) -> tuple[int, str]:
    """pytest's exit status, and what it printed."""
    options = [*(["-k", "triton and not cpp"] if op in OPS else []), "-m", lane, "-p", "no:cacheprovider"]
    out, log = folder / "out", folder / "log"
    interpreters.begin("pytest", HERE / f"test_{FILES.get(op, op)}.py", *options, out=out, log=log)
    (code,) = interpreters.end()
    return code, out.read_text()[-6000:] + log.read_text()[-2000:]


@pytest.mark.parametrize("op", [*OPS, *OF_THE_INTERPRETER])
def test_interpreted(interpreters: Forks, op: str, tmp_path: Path) -> None:
    code, said = interpret(interpreters, op, "not gpu and not slow", tmp_path)
    assert code == 0 and " passed" in said, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", OPS)
def test_interpreted_in_every_combination(interpreters: Forks, op: str, tmp_path: Path) -> None:
    """conftest.py leaves out of the above what only another combination of parameters adds."""
    code, said = interpret(interpreters, op, "not gpu and slow", tmp_path)
    assert code in (0, 5), said  # 5: nothing is left
