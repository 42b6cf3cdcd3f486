import random
from collections import defaultdict
from itertools import combinations
from typing import Any

import pytest

from r1fast_kernels import dispatch
from tests.kernels.backends import EVERYWHERE, Backend
from tests.kernels.heads import TILINGS

LAST_TILING = TILINGS[-1]  # pieces of both


@pytest.fixture(params=EVERYWHERE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The implementation and device that a test runs on."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted, a test over several parameters runs where any two of their values meet, and with the tiling that has
    every loop; all that is left is slow. C++ takes milliseconds for the whole product, and runs it."""
    if not dispatch.INTERPRETING:
        return
    cases: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            cases[item.function].append(item)
    for found in cases.values():
        random.Random(0).shuffle(found)
        met: set[Any] = set()
        for item in found:
            pairs = set(combinations(((name, str(value)) for name, value in item.callspec.params.items()), 2))
            other_tiling = item.callspec.params.get("tiling", LAST_TILING) != LAST_TILING
            if other_tiling or (pairs <= met and len(found) > 1):
                item.add_marker(pytest.mark.slow)
            else:
                met |= pairs


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


if dispatch.INTERPRETING:
    _round_to_bf16_as_gpus_do()
