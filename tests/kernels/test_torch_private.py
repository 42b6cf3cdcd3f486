"""What torch does not promise to keep is there still, does what is expected of it, and is used in one file."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.checkpoint import filesystem
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.utils import _python_dispatch

from r1fast_kernels import torch_private as private

ROOT = Path(__file__).parents[2]
NEEDED = {
    torch: ["_foreach_add_", "_foreach_mul_", "_foreach_lerp", "_foreach_lerp_"],
    torch._C._autograd: ["_get_current_graph_task_keep_graph"],
    torch.ops.mkldnn: ["_is_mkldnn_bf16_supported", "_linear_pointwise"],
    nn.Module(): ["_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set"],
    nn.modules.module: ["_global_forward_pre_hooks", "_global_forward_hooks"],
    FSDPModule: ["_get_fsdp_state"],
    FSDPState: ["_lazy_init"],
    checkpoint_wrapper: ["checkpoint_wrapper"],
    filesystem: ["_StorageInfo"],
    _python_dispatch: ["TorchDispatchMode"],
    fake_tensor: ["FakeTensorMode"],
}
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._[a-z]\w*|from torch[\w.]*\._|from torch[\w.]* import _"
    r"|\._(get_fsdp_state|lazy_init|forward_(pre_)?hooks|non_persistent_buffers_set|modules|parameters|buffers)\b"
)


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in NEEDED.items() for name in names])
def test_torch_has_it(owner: object, name: str) -> None:
    assert hasattr(owner, name), f"torch {torch.__version__} has no {name} any more: mend torch_private.py"


def test_it_does_what_is_expected() -> None:
    wrapped = private.checkpoint_wrapper(nn.Linear(2, 2))
    assert [name for name, _ in wrapped.named_children()] == [private.CHECKPOINT_WRAPPED]
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert [name for name, _ in private.persistent_buffers(module)] == list(module.state_dict())[2:]
    hook = module.register_forward_hook(print)
    assert private.forward_hooks(module) == [print]
    hook.remove()
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda _: seen.append(private.backward_may_repeat()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen == [True, False]


def test_it_is_used_nowhere_else() -> None:
    sources = [*(ROOT / "r1fast").rglob("*.py"), *(ROOT / "kernels" / "r1fast_kernels").glob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        if path.name != "torch_private.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert found == []
