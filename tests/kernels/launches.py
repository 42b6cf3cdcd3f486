"""What the launchers emit: every specialisation that public calls ask Triton for, found by calling, without a GPU.

Public functions get tensors without values (fake ones) of production's shapes. Each operator that they reach runs its
CUDA implementation, which is Python, up to the launch; there Triton specialises on types, constants and sizes as ever,
and a hook takes note of what it is about to compile, in place of compiling. Nothing runs, and nothing takes memory.

The fake tensors are on the CPU, because autograd of a CPU build of torch knows no other device; what depends on the
device in head.py is set to what a GPU has.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from r1fast_kernels import dispatch
from tests.kernels.heads import head_of_a_gpu

Options = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A kernel, specialised."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    odd: bool  # of sizes that no model has: it has to compile and be right, not to be fast

    def __str__(self) -> str:
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature.items() if kind != "constexpr")
        names = self.function.arg_names
        constants = ", ".join(f"{names[place[0]]}={value}" for place, value in self.constants.items())
        return f"{self.function.__name__}({types}; {constants}; {self.options})"


class _Recorder:
    """Of the driver what a launch asks for before it compiles, and the hook that then takes note."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}
        self.odd = False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        launch = Launch(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options, self.odd
        )
        before = self.launches.setdefault(f"{launch} {launch.attributes}", launch)
        if before.odd and not self.odd:
            self.launches[f"{launch} {launch.attributes}"] = launch
        return True  # do not compile


class _OnCuda(TorchDispatchMode):
    """Our operators run their CUDA implementations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "r1fast":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[_Recorder]:
    """Calls of public functions in this block, with tensors that are made in it, launch nothing and are kept."""
    recorder, before = _Recorder(), knobs.runtime.jit_cache_hook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICE", "cpu")
        head_of_a_gpu(patch)
        patch.setattr(driver, "_active", recorder)
        knobs.runtime.jit_cache_hook = recorder
        try:
            with FakeTensorMode(), _OnCuda(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # 0: 16 divides it
                yield recorder
        finally:
            knobs.runtime.jit_cache_hook = before


def covering(
    options: dict[str, Sequence[Any]], strength: int, valid: Callable[[Options], bool] = lambda _: True
) -> list[Options]:
    """Choices in which any `strength` of the options meet in every valid way; few, not fewest."""
    draw = random.Random(0)

    def fill(fixed: Options) -> Options:
        return {name: draw.choice(values) for name, values in options.items()} | fixed

    def tuples(choice: Options) -> set[tuple[tuple[str, int], ...]]:
        places = [(name, options[name].index(value)) for name, value in choice.items()]
        return set(combinations(places, min(strength, len(places))))

    missing = {
        tuple(zip(names, places))
        for names in combinations(options, min(strength, len(options)))
        for places in product(*(range(len(options[name])) for name in names))
    }
    chosen: list[Options] = []
    while missing:
        wanted = min(missing)
        fixed = {name: options[name][place] for name, place in wanted}
        candidates = [choice for choice in (fill(fixed) for _ in range(60)) if valid(choice)]
        if candidates:
            chosen.append(max(candidates, key=lambda choice: len(tuples(choice) & missing)))
            missing -= tuples(chosen[-1])
        missing.discard(wanted)  # no choice holds it: it is not valid
    return chosen


def backward(*outputs: Any) -> None:
    """Of the sum of everything that has a gradient."""
    total = sum(x.sum() for x in outputs if x.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
