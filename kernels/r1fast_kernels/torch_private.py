"""What is used of torch without its promise to keep it: all of it stands here.

tests/kernels/test_torch_private.py names each, and finds one that stands anywhere else.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

OperatorMode = _python_dispatch.TorchDispatchMode  # sees every operator that runs inside
foreach_add_, foreach_mul_ = torch._foreach_add_, torch._foreach_mul_
foreach_lerp, foreach_lerp_ = torch._foreach_lerp, torch._foreach_lerp_

# The only child of what checkpoint_wrapper makes, and a step in the names of its parameters.
CHECKPOINT_WRAPPED = "_checkpoint_wrapped_module"


def checkpoint_wrapper(module: nn.Module, **options: Any) -> nn.Module:
    """Recompute in its backward pass what `module` computes."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module, **options)


def initialize_fsdp(root: Any) -> None:
    """Make an FSDPModule the root now. FSDP takes the first module that runs for it."""
    root._get_fsdp_state()._lazy_init()


def storage_info(file: str, offset: int, length: int) -> Any:
    """Where torch.distributed.checkpoint's FileSystemReader finds a tensor."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def forward_hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def global_forward_hooks() -> list[Any]:
    """Of every module."""
    everywhere = nn.modules.module
    return [*everywhere._global_forward_pre_hooks.values(), *everywhere._global_forward_hooks.values()]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Own ones, which a state dict holds."""
    buffers = module.named_buffers(recurse=False)
    return ((name, buffer) for name, buffer in buffers if name not in module._non_persistent_buffers_set)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions that oneDNN multiplies bf16 with."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias, by oneDNN. No gradient."""
    return torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")


def backward_may_repeat() -> bool:
    """Inside a backward pass: whether it keeps its graph, so that another can follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def fake_tensors() -> Any:
    """Inside, what is made or computed has shape, dtype and device, and takes no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
