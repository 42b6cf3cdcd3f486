"""Kernels for reinforcement learning of language models; usable without r1fast, in any trainer.

Letters in names: T tokens, V vocabulary, D model width, E experts, K experts per token, F expert width, N samples,
B sequences that decode. Every op takes `impl=None | "reference" | "cpp" | "triton"`; None picks by device and dtype,
or takes what is in use: `with r1fast_kernels.use("reference"): ...` asks for it in all ops at once.
"""

from . import hf as hf
from .decode_attention import decode_attention
from .dispatch import use as use
from .group_advantages import group_advantages
from .grouped_gemm import grouped_gemm
from .grpo_loss import grpo_loss
from .linear_cross_entropy import linear_cross_entropy
from .linear_grpo_loss import linear_grpo_loss
from .linear_logprobs import linear_logprobs
from .moe_dispatch import moe_dispatch
from .moe_experts import moe_experts
from .packed_attention import packed_attention
from .rms_norm import rms_norm
from .route_topk import route_topk
from .sample_tokens import sample_tokens
from .selective_logprobs import selective_logprobs

__all__ = [
    "decode_attention", "group_advantages", "grouped_gemm", "grpo_loss", "linear_cross_entropy", "linear_grpo_loss",
    "linear_logprobs", "moe_dispatch", "moe_experts", "packed_attention", "rms_norm", "route_topk", "sample_tokens",
    "selective_logprobs",
]  # fmt: skip
