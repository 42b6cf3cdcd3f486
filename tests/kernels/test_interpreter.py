"""Every Triton kernel, checked without a GPU: the tests that take a backend, in processes that interpret Triton.

Triton decides at import whether it compiles or interprets, hence processes of their own, of one thread.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1fast_kernels import dispatch

HERE = Path(__file__).parent
# Ops that have Triton kernels; linear ops drive those of selective_logprobs.
OPS = [op for op, exists in dispatch.IMPLEMENTATIONS.items() if "triton" in exists and op != "linear_cross_entropy"]

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="this is the interpreter's process")


def interpret(op: str, lane: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / f"test_{op}.py"), "-k", "triton and not cpp", "-m", lane]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True, cwd=HERE.parents[1]
    )


@pytest.mark.parametrize("op", OPS)
def test_interpreted(op: str) -> None:
    result = interpret(op, "not gpu and not slow")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", OPS)
def test_interpreted_in_every_combination(op: str) -> None:
    """conftest.py leaves out of the above what only another combination of parameters adds."""
    result = interpret(op, "not gpu and slow")
    assert result.returncode in (0, 5), result.stdout[-6000:] + result.stderr[-2000:]  # 5: nothing is left
