"""A decode step in one call on a CPU, or the prefill of short prompts; keys and values in the blocks of a cache.

    embedding
    norm -> attention (grouped-query or latent) -> + -> norm -> MLP, or experts and shared experts -> +     per layer
    norm -> head

What they compute is defined by the modules of r1fast.models, op after op. Here a thread takes rows of the batch through
all layers: a step of a small model is neither Python nor threads that wait for each other.

Bound by compute at many rows: 2 FLOPs of each weight that a row meets. Weights are read once for 128 rows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .dispatch import choose, log_choice
from .ids import check_offsets

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

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
# (what such a layer must have, what it may have): the one attention or the other, the one feed-forward or the other.
_GROUPED_QUERY = (
    {f"self_attn.{x}_proj.weight" for x in "qkvo"},
    {f"self_attn.{x}_proj.bias" for x in "qkvo"} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
)
_LATENT = (
    {"self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight",
     "self_attn.o_proj.weight"},
    {"self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias"},
)  # fmt: skip
_LATENT_QUERIES = (
    ({"self_attn.q_proj.weight"}, {"self_attn.q_proj.bias"}),
    ({"self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"},
     {"self_attn.q_a_proj.bias"}),
)  # fmt: skip
_DENSE = (
    {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    {f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
)
_EXPERTS = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
_SHARED = {f"mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")}

_QUERIES = ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")

# Elements of all matrices. Beyond, products are everything, and threads that share each of them are better when rows
# are few. Not a matter of the number of rows: what a row gets must not depend on the batch.
MOST_WEIGHTS = 100_000_000

# Longer ones attend faster in packed_attention, and have other threads to share them with.
MOST_PROMPT_TOKENS = 128

torch.library.define(
    "r1fast::decode_layers",
    "(Tensor input_ids, Tensor first_of_places, Tensor second_of_places, bool prefills, Tensor(a!)[] cache, "
    "Tensor embedding_VD, Tensor?[] weights, Tensor norm_D, Tensor head_VD, Tensor inv_freq_R, float rotary_scale, "
    "bool interleaved, int num_heads, float scale, float eps, float latent_eps, int top_k, int n_group, "
    "int topk_group, bool norm_topk_prob, float routed_scaling_factor) -> (Tensor out, Tensor experts)",
)


@dataclass(frozen=True)
class LayersSpec:
    """What weights do not say. rotary_scale: on cos and sin; latent_eps: of the norms inside latent attention."""

    rotary_scale: float
    interleaved: bool
    num_heads: int
    scale: float
    eps: float
    latent_eps: float
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


def _not_read(names: Collection[str]) -> str | None:
    """What a layer has that would be ignored, or lacks, in words."""
    latent, routed = "self_attn.kv_a_proj_with_mqa.weight" in names, "mlp.gate.weight" in names
    layouts = [(set(_NORMS), set()), _LATENT if latent else _GROUPED_QUERY]
    if latent:
        layouts.append(_LATENT_QUERIES["self_attn.q_a_proj.weight" in names])
    layouts.append((_EXPERTS, {"mlp.gate.e_score_correction_bias"}) if routed else _DENSE)
    if routed and not _SHARED.isdisjoint(names):
        layouts.append((_SHARED, set()))
    needed = set().union(*(must for must, _ in layouts))
    unknown = sorted(set(names) - needed.union(*(may for _, may in layouts)))
    missing = sorted(needed - set(names))
    if unknown:
        return f"has {', '.join(unknown)}, which it does not read beside the others"
    return f"lacks {', '.join(missing)}" if missing else None


class DecodeLayers:
    """A model, ready to be called; it holds the very tensors, which must not move meanwhile.

    embedding_VD     tokens to what the layers read
    layers           for each its parameters and buffers by NAMES; another one is an error, nothing is left out
    norm_D, head_VD  what follows them; all of one dtype, but the router's bias in fp32
    inv_freq_R       fp32 [R / 2]: the last R channels of a head are rotated
    """

    def __init__(
        self,
        embedding_VD: Tensor,
        layers: Sequence[Mapping[str, Tensor]],
        norm_D: Tensor,
        head_VD: Tensor,
        inv_freq_R: Tensor,
        spec: LayersSpec,
    ) -> None:
        for place, layer in enumerate(layers):
            if problem := _not_read(layer.keys()):
                raise ValueError(f"decode_layers: layer {place} {problem}; run its modules")
        self.spec = spec
        self.weights = [layer.get(name) for layer in layers for name in NAMES]
        self.tensors = embedding_VD, self.weights, norm_D, head_VD, inv_freq_R

    def can_run(self) -> bool:
        """False: run the modules (`use` says so, or the model is fp64, not on a CPU or not for it). Logged once."""
        if self._obstacle is not None:
            log_choice("decode_layers", "reference", self._obstacle)
            return False
        return choose("decode_layers", None, self.tensors[0])[0] == "cpp"

    @cached_property
    def _obstacle(self) -> str | None:
        named = [(name, w) for name, w in zip(NAMES * len(self.weights), self.weights) if w is not None]
        matrices = [weight for _, weight in named if weight.dim() > 1]
        queries = [weight for name, weight in named if name in _QUERIES]
        if self.tensors[0].dtype == torch.float64:
            return "the modules for float64"
        if sum(weight.numel() for weight in [*matrices, self.tensors[3]]) > MOST_WEIGHTS:
            return f"the modules for more than {MOST_WEIGHTS:,} weights"
        even = [*(weight.shape[-1] for weight in matrices), *(len(q) // self.spec.num_heads for q in queries)]
        # bf16 is multiplied in pairs
        return "the modules for odd widths" if any(size % 2 for size in even) else None

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
            input_ids_B, positions_B, block_table_BN, False, cache, *self.tensors, *vars(self.spec).values()
        )

    def prefill(
        self, input_ids_T: Tensor, cu_seqlens: Tensor, cache: Sequence[Tensor], slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of each token, [T, D], and experts [MoE layers, T, K], of whole packed sequences.

        cu_seqlens, slots_T   int32 [N + 1] and int64: where each sequence begins, and where its tokens go in the cache
        A sequence stays on one thread: for prompts of up to MOST_PROMPT_TOKENS.
        """
        check_offsets("decode_layers", "cu_seqlens", cu_seqlens, len(slots_T))
        return torch.ops.r1fast.decode_layers(
            input_ids_T, cu_seqlens, slots_T, True, cache, *self.tensors, *vars(self.spec).values()
        )
