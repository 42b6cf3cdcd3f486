"""A decode step in one call on a CPU, or the prefill of short prompts; keys and values in the blocks of a cache.

    embedding
    norm -> attention (grouped-query or latent) -> + -> norm -> MLP, or experts and shared experts -> +     per layer
    norm -> head

What they compute is defined by the modules of r1fast.models, op after op. Here a thread takes rows of the batch through
all layers: a step of a small model is neither Python nor threads that wait for each other. Past 32 MB of weights, which
then come from memory, all threads share each product of all rows, so that every weight comes once.

Bound by compute at many rows: 2 FLOPs of each weight that a row meets. Weights are read once for 128 rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import choose, log_choice
from .ids import check_offsets

# What a layer may have, by its name in a checkpoint; csrc/layer_args.h has them in this order.
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

# Longer ones attend faster in packed_attention, and have other threads to share them with.
MOST_PROMPT_TOKENS = 128

torch.library.define(
    "r1fast::decode_layers",
    "(Tensor input_ids, Tensor first_of_places, Tensor second_of_places, bool prefills, Tensor(a!)[] cache, "
    "Tensor embedding_VD, Tensor?[] weights, Tensor norm_D, Tensor head_VD, Tensor inv_freq_R, float rotary_scale, "
    "bool interleaved, int num_heads, float scale, float eps, float latent_eps, int top_k, int n_group, "
    "int topk_group, bool norm_topk_prob, float routed_scaling_factor) -> (Tensor out, Tensor experts)",
)


def weights_of(layers: Sequence[Mapping[str, Tensor]]) -> list[Tensor | None]:
    """The parameters and buffers of each layer in the order of NAMES. No other is read: ValueError."""
    for place, layer in enumerate(layers):
        if unknown := sorted(layer.keys() - set(NAMES)):
            raise ValueError(f"decode_layers: layer {place} has {', '.join(unknown)}, which it does not read")
    return [layer.get(name) for layer in layers for name in NAMES]


@dataclass(frozen=True)
class DecodeLayers:
    """A model as the operator takes it, and in that order: the very tensors, which must not move meanwhile, and what
    they do not say. All are of one dtype, but the router's bias in fp32."""

    embedding_VD: Tensor  # tokens to what the layers read
    weights: Sequence[Tensor | None]  # weights_of the layers
    norm_D: Tensor
    head_VD: Tensor
    inv_freq_R: Tensor  # fp32 [R / 2]: the last R channels of a head are rotated
    rotary_scale: float  # on cos and sin
    interleaved: bool
    num_heads: int
    scale: float
    eps: float
    latent_eps: float  # of the norms inside latent attention
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    def can_run(self) -> bool:
        """False: run the modules (`use` says so, or the model is fp64, not on a CPU or not for it). Logged once."""
        if reason := self._obstacle():
            log_choice("decode_layers", "reference", reason)
            return False
        return choose("decode_layers", None, self.embedding_VD)[0] == "cpp"

    def _obstacle(self) -> str | None:
        if self.embedding_VD.dtype == torch.float64:
            return "the modules for float64"
        names = NAMES * (len(self.weights) // len(NAMES))
        matrices = [(name, w) for name, w in zip(names, self.weights) if w is not None and w.dim() > 1]
        sizes = [weight.shape[-1] for _, weight in matrices]
        sizes += [len(weight) // self.num_heads for name, weight in matrices if name in _QUERIES]
        return "the modules for odd widths" if any(size % 2 for size in sizes) else None  # bf16: multiplied in pairs

    def __call__(
        self, input_ids_B: Tensor, positions_B: Tensor, cache: Sequence[Tensor], block_table_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """logits_BV in the dtype of the weights, and the experts [MoE layers, B, K] that each row went to.

        input_ids_B, positions_B   int64: a token of each row and its place in a sequence of its own
        cache                      keys and values of each layer [S, K, d], or its latents [S, 1, C + R]; those of the
                                   new tokens are written there
        block_table_BN             int32, as decode_attention has it
        """
        return torch.ops.r1fast.decode_layers(
            input_ids_B, positions_B, block_table_BN, False, cache, *vars(self).values()
        )

    def prefill(
        self, input_ids_T: Tensor, cu_seqlens: Tensor, cache: Sequence[Tensor], slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of each token, [T, D], and experts [MoE layers, T, K], of whole packed sequences.

        cu_seqlens, slots_T   int32 [N + 1] and int64: where each sequence begins, and where its tokens go in the cache
        A sequence stays on one thread: for prompts of up to MOST_PROMPT_TOKENS.
        """
        check_offsets("decode_layers", "cu_seqlens", cu_seqlens, len(slots_T))
        return torch.ops.r1fast.decode_layers(input_ids_T, cu_seqlens, slots_T, True, cache, *vars(self).values())
