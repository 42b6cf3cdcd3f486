"""The Triton kernels as the launchers emit them, without a GPU: they are typed, compile, do not spill, and fit.

                               by default                      -m slow
    typed (Triton's own IR)    any two options meet            any three
    compiled for sm_90         each value of an option         any two; widths that 16 does not divide
    compiled for sm_80         one specialisation a kernel     the same

`cuobjdump` is part of Triton's wheel. Run with -s to see registers and shared memory.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

import r1fast_kernels as kernels
from r1fast_kernels import dispatch
from tests.kernels.fake_gpu import REGISTERS, SHARED_BYTES, Specialisation, Usage, fake_gpu, usage_of
from tests.kernels.launch_cases import CASES, covering
from tests.kernels.loss_settings import random_batch, random_settings

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter compiles nothing")


def all_kernels() -> set[str]:
    """The kernels that launchers start; what they call has no name that ends so."""
    return {
        name for module, contents in list(sys.modules.items()) if module.startswith("r1fast_kernels.")
        for name, value in vars(contents).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }  # fmt: skip


class Launch(NamedTuple):
    special: Specialisation
    odd: bool  # of sizes that no model has: it has to compile and be right, not to be fast

    def __str__(self) -> str:
        return str(self.special)


@cache
def launches(strength: int, *, odd: bool = True, arch: int = 90) -> dict[str, list[Launch]]:
    """By kernel, each specialisation once. odd=False: without sizes that no model has."""
    found: dict[str, Launch] = {}
    with fake_gpu(arch=arch) as gpu:
        for case in CASES.values():
            valid = case.valid if odd else lambda x, case=case: case.valid(x) and not case.odd(x)
            for options in covering(case.options, strength, valid):
                gpu.launches.clear()
                case.call(**options)
                for special in (launch.specialisation for launch in gpu.launches):
                    if special.key not in found or not case.odd(options):
                        found[special.key] = Launch(special, case.odd(options))
    by_kernel: dict[str, list[Launch]] = defaultdict(list)
    for launch in found.values():
        by_kernel[launch.special.name].append(launch)
    return by_kernel


def type_launch(special: Specialisation) -> None:
    """The compiler's first stage, which alone looks at what Python wrote."""
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(dict(special.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    special.source.make_ir(target, options, functions, backend.get_module_map(), context)


def compile_launch(special: Specialisation, arch: int) -> Usage:
    compiled = triton.compile(special.source, target=GPUTarget("cuda", arch, 32), options=special.options)
    return usage_of(compiled.asm["cubin"], compiled.metadata.shared)


def assert_typed(chosen: Sequence[Launch]) -> None:
    for launch in chosen:
        try:
            type_launch(launch.special)
        except triton.CompilationError as error:
            pytest.fail(f"{launch}: {error}")


def assert_compiled(chosen: Sequence[Launch], arch: int) -> None:
    assert chosen, "no launch at all"
    for launch in chosen:
        usage = compile_launch(launch.special, arch)
        if launch.odd:
            continue
        print(f"\nsm_{arch}  {usage.registers:3d} registers  {usage.shared_bytes:6d} B shared  {launch}", end="")
        assert usage.spilled_bytes == 0, f"{launch} on sm_{arch}: {usage}"
        assert usage.shared_bytes <= SHARED_BYTES[arch], f"{launch} on sm_{arch}: {usage}"
        threads = 32 * launch.special.options["num_warps"]
        assert usage.registers * threads <= REGISTERS, f"{launch} on sm_{arch}: {usage} in {threads} threads"


KERNELS = sorted(all_kernels())
HOPPER_ONLY = {"_expert_swiglu_kernel", "_zero_skipped_kernel"}  # they stand beside torch's grouped products
for_both = pytest.mark.parametrize("arch", [90, 80], ids=["sm90", "sm80"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_typed(kernel: str) -> None:
    assert_typed(launches(2)[kernel])


@for_both
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spills(kernel: str, arch: int) -> None:
    found = launches(1, odd=False, arch=arch)[kernel]
    assert bool(found) == (arch == 90 or kernel not in HOPPER_ONLY)
    if found:
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
    if arch == 90 or kernel not in HOPPER_ONLY:
        assert_compiled(launches(2, arch=arch)[kernel], arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_settings_of_the_loss_compile_without_spills() -> None:
    with fake_gpu() as gpu:
        for seed in range(200):
            batch = random_batch(seed)
            tensors = {name: x.float() if x is not None and x.is_floating_point() else x for name, x in batch.items()}
            kernels.grpo_loss(**tensors | random_settings(seed))
    found = {x.specialisation.key: x.specialisation for x in gpu.launches if x.name == "_grpo_kernel"}
    assert len(found) > 100
    assert_compiled([Launch(special, odd=False) for special in found.values()], 90)


def test_latents_fit_a_small_gpu() -> None:
    """Without wgmma tiles are those of sm_120, whose blocks have 99 KB (vllm#46721)."""
    with fake_gpu(arch=80) as gpu:
        CASES["decode_attention"].call(torch.bfloat16, (576, 512), True, (128, 1), 40, None, None)
    assert compile_launch(gpu.launches[-1].specialisation, 80).shared_bytes <= 101_376


def test_every_kernel_is_launched() -> None:
    assert len(KERNELS) >= 15 and set(KERNELS) == set(launches(1, odd=False))


def test_a_kernel_that_spills_is_noticed() -> None:
    """Else the check above could not fail: the same kernel, with fewer registers than most of its forms need."""
    folds = [fold.special for fold in launches(1, odd=False)["_fold_kernel"]]
    few = (replace(fold, options={**fold.options, "maxnreg": 24}) for fold in folds)
    assert any(compile_launch(fold, 90).spilled_bytes > 0 for fold in few)
