"""torch's grouped product (CUTLASS) in place of ours, where it is faster.

TFLOP/s of both on an H200 (bench/results/h200-all.json: bf16, E 128, D 2048, N 1536):

    rows an expert                 512     1024     2048
    forward                   572, 354 645, 434 657, 464
    forward and backward      543, 346 630, 411 669, 454

Other dtypes and devices than the rule below lets pass run a loop over experts there, which waits for the device; below
128 rows an expert, of which its tile holds so many, a product waits for weights, and our tiles are smaller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

MIN_ROWS = 128  # an expert, on average
MOST_EXPERTS = 1023


def on_hopper(device: torch.device) -> bool:
    """Not Blackwell: there weights of experts without rows got no zeros as their gradient (pytorch#172439)."""
    return dispatch.capability(device)[0] == 9


def takes(num_rows: int, num_experts: int, *factors: Tensor) -> bool:
    """Whether products of these contiguous rows and weights are torch's. It wants rows that begin at 16 bytes."""
    return (
        factors[0].dtype == torch.bfloat16
        and on_hopper(factors[0].device)
        and 0 < num_experts <= MOST_EXPERTS
        and num_rows >= MIN_ROWS * num_experts
        and all(size % 8 == 0 for x in factors for size in x.shape[1:])
        and all(x.data_ptr() % 16 == 0 for x in factors)
    )


def multiply(x_MD: Tensor, weight: Tensor, offsets_E: Tensor, transpose_weight: bool) -> Tensor:
    """[M, N]; rows from offsets_E[-1] on are not written (pytorch#193633)."""
    return F.grouped_mm(x_MD, weight.mT if transpose_weight else weight, offs=offsets_E)


def weight_gradient(x_MD: Tensor, y_MN: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, N, D]; 0 for an expert without rows."""
    return F.grouped_mm(y_MN.mT, x_MD, offs=offsets_E)
