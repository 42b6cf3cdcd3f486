"""Where each token's row stands among the rows sorted by expert.

    choices (t, k), token-major    0 1 2 3 4 ...   --order_M-->   | expert 0 | expert 1 | ... | ids >= E, skipped |
                                                   <--slot_TK--   offsets_E      end of 0   end of 1 ...

Stable, so deterministic: within an expert, rows keep the order of their tokens. A counting sort on a CPU; on a GPU
histograms of blocks, a prefix over blocks and ranks inside a block: no atomics, no wait for the device. 8 T K bytes
read, 8 T K written.
"""

import torch
from torch import Tensor

from .dispatch import choose


def moe_dispatch_reference(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    expert_M = expert_ids_TK.flatten().clamp(max=num_experts)
    order_M = expert_M.argsort(stable=True)
    slot_TK = order_M.argsort().view_as(expert_ids_TK)
    ends_E = torch.arange(num_experts, device=expert_M.device)
    offsets_E = torch.searchsorted(expert_M[order_M], ends_E, right=True)
    return order_M.int(), slot_TK.int(), offsets_E.int()


torch.library.define(
    "r1fast::moe_dispatch",
    "(Tensor expert_ids_TK, int num_experts) -> (Tensor order_M, Tensor slot_TK, Tensor offsets_E)",
)


@torch.library.register_fake("r1fast::moe_dispatch")
def fake(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def int32(*shape: int) -> Tensor:
        return expert_ids_TK.new_empty(shape, dtype=torch.int32)

    return int32(expert_ids_TK.numel()), int32(*expert_ids_TK.shape), int32(num_experts)


def moe_dispatch(expert_ids_TK: Tensor, num_experts: int, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the T K choices by expert.

    expert_ids_TK   [T, K] int64 >= 0; an id >= num_experts is skipped: it stands behind all others
    Returns int32 order_M [T K] (which choice, t K + k, stands in a row), slot_TK (its inverse: the row of a choice),
    and offsets_E: the end of each expert's rows. Rows from offsets_E[-1] on belong to skipped choices.
    """
    if expert_ids_TK.dim() != 2:
        raise ValueError(f"moe_dispatch: got expert ids {tuple(expert_ids_TK.shape)}, expected [T, K]")
    if choose("moe_dispatch", impl, expert_ids_TK) == "reference":
        return moe_dispatch_reference(expert_ids_TK, num_experts)
    return torch.ops.r1fast.moe_dispatch(expert_ids_TK, num_experts)
