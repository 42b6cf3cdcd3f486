"""The one way in which a Triton kernel is started."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device and current stream of its tensors.

    Triton alone takes the current device, on which tensors of cuda:1 are foreign memory, or on a machine that maps
    them a kernel in the wrong stream. Whether a * b + c is rounded once or twice decides bits: it is once, whatever
    TRITON_DEFAULT_FP_FUSION says.
    Raises ValueError for tensors of several devices.
    """
    given = [x.base if isinstance(x, TensorDescriptor) else x for x in args]
    tensors = [x for x in given if isinstance(x, Tensor)]
    first = tensors[0]
    if any(x.device != first.device for x in tensors):
        found = ", ".join(sorted({str(x.device) for x in tensors}))
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        raise ValueError(f"{name}: got tensors on {found}, expected all on one device")
    with torch.cuda.device_of(first):
        kernel[grid](*args, enable_fp_fusion=True, **options)
