"""Every Triton kernel compiled for sm_90 and sm_80 at the tile sizes of production: no spills, fits in shared memory.

No GPU is needed; `cuobjdump` is part of Triton's wheel. Run with -s to see registers and shared memory.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r1fast_kernels import dispatch
from tests.kernels.kernel_table import KERNELS, Kernel

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter compiles nothing")


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_kernel(kernel: Kernel, arch: int) -> Usage:
    arguments = kernel.function.arg_names
    assert set(kernel.signature) | set(kernel.constants) == set(arguments), kernel.name
    signature = {name: kernel.signature.get(name, "constexpr") for name in arguments}
    constants: dict[Any, Any] = {(arguments.index(name),): value for name, value in kernel.constants.items()}
    # What the launcher's specialization sees in production: pointers from torch, sizes divisible by 16.
    attributes = {
        (arguments.index(name),): [["tt.divisibility", 16]] for name, kind in kernel.signature.items()
        if kind.startswith("*") or name in kernel.divisible
    }  # fmt: skip
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing.stdout)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


@pytest.mark.parametrize("arch", [90, 80], ids=["sm90", "sm80"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_without_spills(kernel: Kernel, arch: int) -> None:
    usage = compile_kernel(kernel, arch)
    print(f"\n{kernel.name:45s} sm_{arch}  {usage.registers:3d} registers  {usage.shared_bytes:6d} B shared", end="")
    assert usage.spilled_bytes == 0, f"{kernel.name} on sm_{arch}: {usage}"
    assert usage.shared_bytes <= SHARED_MEMORY[arch], f"{kernel.name} on sm_{arch}: {usage}"
    threads = 32 * kernel.options["num_warps"]
    assert usage.registers * threads <= 65_536, f"{kernel.name} on sm_{arch}: {usage} in {threads} threads"


def test_a_kernel_that_spills_is_noticed() -> None:
    """Else the check above could not fail: the same kernel, 64 times too wide."""
    fold = KERNELS[0]
    wide = Kernel(fold.name, fold.function, fold.signature, {**fold.constants, "BLOCK_V": 1 << 17}, fold.options)
    assert compile_kernel(wide, 90).spilled_bytes > 0
