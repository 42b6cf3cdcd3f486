"""A decode step behind the embedding in one call on a CPU: one new token per row, keys and values in a cache's blocks.

    norm -> attention (grouped-query or latent) -> + -> norm -> MLP, or experts and shared experts -> +     per layer
    norm -> head

What they compute is defined by the modules of r1fast.models, op after op. Here a thread takes rows of the batch through
all layers: a step of a small model is neither Python nor threads that wait for each other.

Bound by compute at many rows: 2 FLOPs of each weight that a row meets. Weights are read once for 128 rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .dispatch import choose

# What a layer may have, by its name in a checkpoint; csrc/cpu/decode_layers.cpp reads them in this order.
NAMES = (
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight", "self_attn.k_proj.bias",
    "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", "self_attn.o_proj.bias",
    "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    "self_attn.q_a_proj.weight", "self_attn.q_a_proj.bias", "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_proj_with_mqa.bias",
    "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight",
    "mlp.gate_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.weight", "mlp.up_proj.bias",
    "mlp.down_proj.weight", "mlp.down_proj.bias",
    "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight",
    "mlp.gate.weight", "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
)  # fmt: skip

_QUERIES = ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")

# Elements of all matrices. Beyond, products are everything, and threads that share each of them are better when rows
# are few. Not a matter of the number of rows: what a row gets must not depend on the batch.
MOST_WEIGHTS = 100_000_000

torch.library.define(
    "r1fast::decode_layers",
    "(Tensor x_BD, Tensor?[] weights, Tensor(a!)[] cache, Tensor slots_B, Tensor block_table_BN, Tensor lengths_B, "
    "Tensor cos_BR, Tensor sin_BR, Tensor norm_D, Tensor head_VD, bool interleaved, int num_heads, float scale, "
    "float eps, float latent_eps, int top_k, int n_group, int topk_group, bool norm_topk_prob, "
    "float routed_scaling_factor) -> (Tensor logits_BV, Tensor experts_LBK)",
)


@dataclass(frozen=True)
class LayersSpec:
    """What weights do not say. latent_eps: of the norms inside latent attention."""

    num_heads: int
    scale: float
    eps: float
    latent_eps: float
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class DecodeLayers:
    """A model's layers and head, ready to be called; it holds the very tensors, which must not move meanwhile.

    layers: for each its parameters and buffers by NAMES; norm_D, head_VD: what follows them. All of one dtype, but the
    router's bias in fp32.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, Tensor]], norm_D: Tensor, head_VD: Tensor, spec: LayersSpec
    ) -> None:
        self.weights = [layer.get(name) for layer in layers for name in NAMES]
        self.norm_D, self.head_VD, self.spec = norm_D, head_VD, spec

    def can_run(self, impl: str | None, x_BD: Tensor) -> bool:
        """False: run the modules (`impl` says so, x is fp64 or not on a CPU, or the model is not for this op)."""
        return (
            impl in (None, "cpp")
            and self._fits
            and x_BD.dtype != torch.float64
            and choose("decode_layers", impl, x_BD) == "cpp"
        )

    @cached_property
    def _fits(self) -> bool:
        named = [(name, w) for name, w in zip(NAMES * len(self.weights), self.weights) if w is not None]
        matrices = [weight for _, weight in named if weight.dim() > 1]
        queries = [weight for name, weight in named if name in _QUERIES]
        return (
            sum(weight.numel() for weight in [*matrices, self.head_VD]) <= MOST_WEIGHTS
            # bf16 is multiplied in pairs
            and all(weight.shape[-1] % 2 == 0 for weight in matrices)
            and all(len(weight) // self.spec.num_heads % 2 == 0 for weight in queries)
        )

    def __call__(
        self,
        x_BD: Tensor,
        cache: Sequence[Tensor],
        slots_B: Tensor,
        block_table_BN: Tensor,
        lengths_B: Tensor,
        rope: tuple[Tensor, Tensor],
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        """logits_BV in the dtype of x, and the experts [MoE layers, B, K] that each row went to.

        cache            keys and values of each layer [S, K, d], or its latents [S, 1, C + R]; row b is written to
                         slots_B (int64), in sequences of their own
        block_table_BN, lengths_B    int32, as decode_attention has them, the new token included
        rope             cos and sin [B, R / 2] in the dtype of x; the last R channels of a head are rotated
        """
        return torch.ops.r1fast.decode_layers(
            x_BD, self.weights, cache, slots_B, block_table_BN, lengths_B, *rope, self.norm_D, self.head_VD,
            interleaved, *vars(self.spec).values(),
        )  # fmt: skip
