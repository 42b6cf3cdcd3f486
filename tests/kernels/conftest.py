from typing import Any

import pytest

from r1fast_kernels import dispatch
from tests.kernels.backends import EVERYWHERE, Backend


@pytest.fixture(params=EVERYWHERE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The implementation and device that a test runs on."""
    return request.param


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
