"""A CUDA driver for Triton that launches nothing: what kernels are started, and how, on a machine without a GPU.

    with fake_gpu() as gpu:                     tensors made in here are on device 1; the current one is device 0
        moe_experts(torch.empty(..), ..)
    gpu.launches   every Triton launch: kernel, specialisation, grid, arguments
    gpu.kernels    names of all that a GPU would run, in order: these launches, and torch's own kernels
    gpu.scratch(call)   bytes that a call takes beyond what it leaves

Public functions are called as ever. Our operators run their CUDA implementations, which are Python, and Triton
specialises on types, constants and sizes for the device; in place of the launch stands a record of it. With `compiles`
kernels are also compiled for `arch`, and refused where they want more shared memory or threads than it has.

Tensors are without values (FakeTensor), of any size; with `values` they are ordinary CPU tensors, and what kernels
would fill is 0. A device of theirs is "cpu:1" for cuda:1, as autograd of a CPU build of torch knows no other type: an
index that torch keeps, and compares. `is_cuda` is true of them: what depends on the device asks for that.

A launch is refused (LaunchError) on another device than that of its tensors, or on a grid that CUDA does not take.
"""

import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from r1fast_kernels import dispatch
from r1fast_kernels.torch_private import backward_may_repeat
from tests.kernels.heads import HEAD, head_of_a_gpu

SHARED_BYTES = {80: 166_912, 90: 232_448}  # that a block may have
REGISTERS, MOST_THREADS = 65_536, 1024  # of a block
MOST_GRID = (2**31 - 1, 65_535, 65_535)
# What a launcher asks of the compiler, among all of its options.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")
# Operators of torch that start no kernel and are no views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
             "resize_", "set_", "_local_scalar_dense"}  # fmt: skip


class LaunchError(Exception):
    """A launch that CUDA would refuse, or that would read another device's memory."""


class Device(NamedTuple):
    """What Triton keeps compiled kernels by, where it has the index alone."""

    index: int
    arch: int
    compiles: bool


class TensorArgument(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: int


@dataclass(frozen=True)
class Specialisation:
    """A kernel, for types and constants of its arguments: what is compiled once."""

    function: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.function, self.signature, self.constants, self.attributes)

    def __str__(self) -> str:
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature.items() if kind != "constexpr")
        names = self.function.arg_names
        constants = ", ".join(f"{names[place[0]]}={value}" for place, value in self.constants.items())
        options = {name: value for name, value in self.options.items() if name in OPTIONS[:2]}
        return f"{self.name}({types}; {constants}; {options})"

    @property
    def key(self) -> str:
        """Equal for two launches that one binary serves."""
        return f"{self} {self.options} {sorted(self.attributes.items())}"


@dataclass(frozen=True)
class Launch:
    specialisation: Specialisation
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by the kernel's names; of a tensor, or a descriptor's, TensorArgument
    shared_bytes: int | None  # None: not compiled

    @property
    def name(self) -> str:
        return self.specialisation.name

    @property
    def num_programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Usage:
    """Of a compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def usage_of(cubin: bytes, shared_bytes: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listing = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing.stdout)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared_bytes)


class _Utils:
    """Of the driver what loads a kernel."""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: Device) -> tuple[None, int, int, int, int]:
        usage = usage_of(cubin, shared)
        threads = REGISTERS // max(usage.registers, 1) // 32 * 32
        return None, 1, usage.registers, usage.spilled_bytes, min(threads, MOST_THREADS)

    def get_device_properties(self, device: Device) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[device.arch], "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    """In place of the C function that launches; kept by Triton with the kernel, so that it asks which GPU is active."""

    def __init__(self, source: ASTSource, metadata: Any) -> None:
        options = {name: getattr(metadata, name) for name in OPTIONS}
        self.special = Specialisation(source.fn, source.signature, source.constants, source.attrs, options)
        self.shared_bytes = getattr(metadata, "shared", None)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
        _, _, _, *arguments = rest  # launch metadata, two hooks
        driver.active.record(self.special, (x, y, z), arguments, self.shared_bytes)


class _NotCompiled:
    """In place of a compiled kernel."""

    function = packed_metadata = 0

    def __init__(self, source: ASTSource, options: Any) -> None:
        self.run = _Launcher(source, options)

    def launch_metadata(self, *_: Any) -> None:
        return None


_compile = JITFunction._do_compile


def _maybe_compile(
    function: Any, key: str, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
) -> Any:
    if device.compiles:
        return _compile(function, key, signature, device, constants, options, attributes, warmup)
    source = ASTSource(function, signature, constants, attributes)
    kernel = function.device_caches[device][0][key] = _NotCompiled(source, options)
    return kernel


class FakeGpu:
    """Of Triton's driver what a launch asks for, and what it was asked."""

    launcher_cls = _Launcher

    def __init__(self, arch: int, compiles: bool) -> None:
        self.arch, self.compiles, self.utils = arch, compiles, _Utils()
        self.current = 0
        self.launches: list[Launch] = []
        self.kernels: list[str] = []
        self.live_bytes = self.peak_bytes = 0
        self._live: set[int] = set()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> Device:
        return Device(self.current, self.arch, self.compiles)

    def get_current_stream(self, device: Device) -> int:
        return 0

    def exchange_device(self, index: int) -> int:
        """torch.cuda's: a negative index changes nothing."""
        before = self.current
        if index >= 0:
            self.current = index
        return before if index >= 0 else -1

    def record(self, special: Specialisation, grid: Any, arguments: list[Any], shared_bytes: int | None) -> None:
        if any(not 0 <= size <= most for size, most in zip(grid, MOST_GRID)):
            raise LaunchError(f"{special.name}: got a grid of {grid}, expected at most {MOST_GRID}")
        described = tuple(map(_described, arguments))
        for tensor in tree_leaves(described, is_leaf=lambda x: isinstance(x, TensorArgument)):
            if isinstance(tensor, TensorArgument) and tensor.device != self.current:
                raise LaunchError(
                    f"{special.name}: launched on device {self.current}, with a tensor on device {tensor.device}"
                )
        if 0 in grid:
            return  # nothing is launched
        names = special.function.arg_names
        self.launches.append(Launch(special, grid, dict(zip(names, described, strict=True)), shared_bytes))
        self.kernels.append(special.name)

    def note(self, operator: Any, inputs: list[Any], outputs: list[Any]) -> None:
        """What an operator of torch did: its kernel, and storages that are new."""
        made = [x for x in outputs if isinstance(x, Tensor)]
        name = operator._schema.name.removeprefix("aten::")
        on_device = any(_is_on_gpu(x) for x in (*inputs, *made))
        if on_device and not operator.is_view and name not in NO_KERNEL and any(x.numel() for x in made):
            self.kernels.append(name)
        for storage in (x.untyped_storage() for x in made if _is_on_gpu(x)):
            if storage._cdata not in self._live:
                self._live.add(storage._cdata)
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage: int, num_bytes: int) -> None:
        self._live.remove(storage)
        self.live_bytes -= num_bytes

    def scratch(self, call: Callable[[], Any]) -> int:
        """Most bytes that `call` had at a time, beyond those that are left of it: its results, what autograd saved."""
        before = self.peak_bytes = self.live_bytes
        result = call()
        scratch = self.peak_bytes - max(self.live_bytes, before)
        del result
        return scratch


def _is_on_gpu(x: Any) -> bool:
    """Of tensors without values the others, with no index, are the host's."""
    return isinstance(x, Tensor) and (not isinstance(x, FakeTensor) or x.device.index is not None)


def _described(argument: Any) -> Any:
    if isinstance(argument, TensorDescriptor):  # which checks sizes and strides; of a FakeTensor not where it begins
        if argument.base.data_ptr() % 16:
            raise LaunchError("cuTensorMapEncodeTiled: got a tensor that begins at no multiple of 16 bytes")
        argument = argument.base
    if isinstance(argument, Tensor):
        return TensorArgument(tuple(argument.shape), argument.stride(), argument.dtype, argument.device.index or 0)
    return tuple(map(_described, argument)) if isinstance(argument, tuple) else argument


class _OnGpu(TorchDispatchMode):
    """Our operators run their CUDA implementations; torch's are noted."""

    def __init__(self, gpu: FakeGpu, values: bool) -> None:
        super().__init__()
        self.gpu, self.values = gpu, values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "r1fast":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
        outputs = func(*args, **kwargs)
        if func.namespace != "prim":
            if self.values and "empty" in func._schema.name:
                outputs.zero_()
            self.gpu.note(func, tree_leaves((args, kwargs)), tree_leaves(outputs))
        return outputs


class _AsOnGpu(TorchFunctionMode):
    """What a GPU has a kernel for, a CPU several operators; and data for a device, of which torch drops the index."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = len(self.gpu.kernels)
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "rms_norm":
            self.gpu.kernels[before:] = ["rms_norm"]
        if func is torch.tensor and isinstance(result, FakeTensor):
            device = kwargs.get("device") or torch.get_default_device()
            result = torch.empty(result.shape, dtype=result.dtype, device=device)
        return result


def _address(tensor: FakeTensor) -> int:
    """Tensors share it as they share memory."""
    return (tensor.untyped_storage()._cdata << 4) + tensor.storage_offset() * tensor.element_size()


@contextmanager
def fake_gpu(*, arch: int = 90, index: int = 1, compiles: bool = False, values: bool = False) -> Iterator[FakeGpu]:
    """What is called in this block on tensors that are made in it launches nothing, and is noted.

    arch       80 or 90
    index      the device on which tensors are made, unless they say otherwise; those with `values` are on device 0
    compiles   compile kernels too, which takes seconds each, once
    values     tensors have values, and take memory
    """
    gpu = FakeGpu(arch, compiles)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as modes:
        patch.setattr(dispatch, "TRITON_DEVICE", "cpu")
        patch.setattr(dispatch, "capability", lambda device: divmod(arch, 10))
        head_of_a_gpu(patch)
        # Elsewhere a FakeTensor in a backward pass means that it is traced.
        patch.setattr(sys.modules[HEAD], "may_overwrite", lambda _: not backward_may_repeat())
        patch.setattr(driver, "_active", gpu)
        patch.setattr(JITFunction, "_do_compile", _maybe_compile)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            patch.setattr(torch.cuda, name, gpu.exchange_device)
        patch.setattr(FakeTensor, "data_ptr", _address)
        patch.setattr(FakeTensor, "is_cuda", property(_is_on_gpu), raising=False)
        if not values:
            modes.enter_context(FakeTensorMode())
            modes.enter_context(torch.device("cpu", index))
        modes.enter_context(_AsOnGpu(gpu))
        modes.enter_context(_OnGpu(gpu, values))
        yield gpu
