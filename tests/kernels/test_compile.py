"""The Triton kernels as the launchers emit them, without a GPU: they are typed, compile, do not spill, and fit.

                               by default                      -m slow
    typed (Triton's own IR)    any two options meet            any three
    compiled for sm_90         each value of an option         any two; widths that 16 does not divide
    compiled for sm_80         one specialisation a kernel     the same

`cuobjdump` is part of Triton's wheel. Run with -s to see registers and shared memory.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

import r1fast_kernels as kernels
from r1fast_kernels import dispatch
from tests.kernels.launch_cases import CASES
from tests.kernels.launches import Launch, covering, recording
from tests.kernels.loss_settings import random_batch, random_settings

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter compiles nothing")


def all_kernels() -> set[str]:
    """The kernels that launchers start; what they call has no name that ends so."""
    return {
        name for module, contents in list(sys.modules.items()) if module.startswith("r1fast_kernels.")
        for name, value in vars(contents).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }  # fmt: skip


@cache
def launches(strength: int, *, odd: bool = True) -> dict[str, list[Launch]]:
    """By kernel. odd=False: without sizes that no model has."""
    found: dict[str, list[Launch]] = defaultdict(list)
    with recording() as seen:
        for case in CASES.values():
            valid = case.valid if odd else lambda x, case=case: case.valid(x) and not case.odd(x)
            for options in covering(case.options, strength, valid):
                seen.odd = case.odd(options)
                case.call(**options)
    for launch in seen.launches.values():
        found[launch.function.__name__].append(launch)
    return found


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int
    shared_bytes: int


def source_of(launch: Launch) -> ASTSource:
    return ASTSource(
        fn=launch.function, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )


def type_launch(launch: Launch) -> None:
    """The compiler's first stage, which alone looks at what Python wrote."""
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(dict(launch.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source_of(launch).make_ir(target, options, functions, backend.get_module_map(), context)


def compile_launch(launch: Launch, arch: int) -> Usage:
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing.stdout)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def assert_typed(chosen: Sequence[Launch]) -> None:
    for launch in chosen:
        try:
            type_launch(launch)
        except triton.CompilationError as error:
            pytest.fail(f"{launch}: {error}")


def assert_compiled(chosen: Sequence[Launch], arch: int) -> None:
    assert chosen, "no launch at all"
    for launch in chosen:
        usage = compile_launch(launch, arch)
        if launch.odd:
            continue
        print(f"\nsm_{arch}  {usage.registers:3d} registers  {usage.shared_bytes:6d} B shared  {launch}", end="")
        assert usage.spilled_bytes == 0, f"{launch} on sm_{arch}: {usage}"
        assert usage.shared_bytes <= SHARED_MEMORY[arch], f"{launch} on sm_{arch}: {usage}"
        threads = 32 * launch.options["num_warps"]
        assert usage.registers * threads <= 65_536, f"{launch} on sm_{arch}: {usage} in {threads} threads"


KERNELS = sorted(all_kernels())
for_both = pytest.mark.parametrize("arch", [90, 80], ids=["sm90", "sm80"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_typed(kernel: str) -> None:
    assert_typed(launches(2)[kernel])


@for_both
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(kernel: str, arch: int) -> None:
    found = launches(1, odd=False)[kernel]
    assert_compiled(found if arch == 90 else found[:1], arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_three_options_are_typed(kernel: str) -> None:
    assert_typed(launches(3)[kernel])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@for_both
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_two_options_compile_without_spills(kernel: str, arch: int) -> None:
    assert_compiled(launches(2)[kernel], arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_settings_of_the_loss_compile_without_spills() -> None:
    with recording() as seen:
        for seed in range(200):
            batch = random_batch(seed)
            tensors = {name: x.float() if x is not None and x.is_floating_point() else x for name, x in batch.items()}
            kernels.grpo_loss(**tensors | random_settings(seed))
    found = [launch for launch in seen.launches.values() if launch.function.__name__ == "_grpo_kernel"]
    assert len(found) > 100
    assert_compiled(found, 90)


def test_every_kernel_is_launched() -> None:
    assert len(KERNELS) >= 15 and set(KERNELS) == set(launches(1, odd=False))


def test_a_kernel_that_spills_is_noticed() -> None:
    """Else the check above could not fail: the same kernel, with fewer registers than most of its forms need."""
    few = (replace(fold, options={**fold.options, "maxnreg": 24}) for fold in launches(1, odd=False)["_fold_kernel"])
    assert any(compile_launch(fold, 90).spilled_bytes > 0 for fold in few)
