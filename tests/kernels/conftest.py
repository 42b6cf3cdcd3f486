import random
from collections import defaultdict
from itertools import combinations
from typing import Any

import pytest

from r1fast_kernels import dispatch
from tests.kernels.backends import EVERYWHERE, FP32, TRITON, Backend
from tests.kernels.heads import TILINGS

LAST_TILING = TILINGS[-1]  # pieces of both
ALONE = ["test_checked_memory.py", "test_sampling_passes.py", "test_wide_offsets.py"]  # of the interpreter
collect_ignore = [] if dispatch.INTERPRETING else ALONE


@pytest.fixture(params=EVERYWHERE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The implementation and device that a test runs on."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted, a test over several parameters runs once with each value, one over three or more (dtypes apart)
    where any two values meet, with the tiling that has every loop; all that is left is slow. C++ takes milliseconds for
    the whole product, and runs it, as a GPU does."""
    if not dispatch.INTERPRETING:
        for item in items:
            if item.path.name in ALONE:  # given by name: its tensors of gigabytes would be filled
                item.add_marker(pytest.mark.skip(reason="of the interpreter; test_interpreter.py runs it"))
        return
    cases: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            cases[item.function].append(item)
    for found in cases.values():
        random.Random(0).shuffle(found)
        met: set[Any] = set()
        for item in found:
            params = dict(item.callspec.params)
            backend = params.pop("backend", TRITON)
            unknown_dtype = params.get("dtype", FP32) not in backend.dtypes
            if not backend.interpreted or unknown_dtype or item.get_closest_marker("slow"):
                continue  # does not run, and meets nothing
            values = [(name, str(value)) for name, value in params.items()]
            new = set(values)
            if len(wide := [value for value in values if value[0] != "dtype"]) > 2:
                new |= set(combinations(wide, 2))
            if params.get("tiling", LAST_TILING) != LAST_TILING or (values and new <= met):
                item.add_marker(pytest.mark.slow)
            else:
                met |= new


def _round_to_bf16_as_gpus_do() -> None:
    """Triton's interpreter cuts fp32 off to bf16; every GPU rounds to the nearest, ties to even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits >> 16) | 0x40  # rounding up could turn a NaN into infinity
        data = np.where(np.isnan(src.data), nan, rounded).astype(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    # The class holds the method under several names.
    for name in ("cast_impl", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, rounding_cast)


def _invert_unsigned_numbers() -> None:
    """Triton 3.6's interpreter makes all ones of -1, which numpy 2 takes for no unsigned number."""
    import numpy as np
    from triton.runtime import interpreter

    def all_ones(self: Any, kind: Any) -> Any:
        return interpreter.TensorHandle(np.full(1, -1).astype(interpreter._get_np_dtype(kind)), kind.scalar)

    interpreter.InterpreterBuilder.get_all_ones_value = all_ones


if dispatch.INTERPRETING:
    from tests.kernels import checked_memory

    _round_to_bf16_as_gpus_do()
    _invert_unsigned_numbers()
    checked_memory.install()
    checked_memory.fill_new_memory()

    @pytest.fixture(autouse=True)
    def every_launch_in_every_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the slow lane; else the first launches of each kernel."""
        if request.node.get_closest_marker("slow"):
            monkeypatch.setattr(checked_memory, "reordered", None)
