"""A decode step on a GPU by few launches, nine a dense layer: the modules' arithmetic, their products joined.

    x -> embedding
    x, n -> x + last, its norm      q, k, v -> joined product      q -> rotated; k, v -> cache      a -> attention
    x, n -> x + o(a), its norm      gate, up -> joined product     i -> silu(gate) up               last -> down(i)
    logits -> head of the norm of x + last

While rows decode, the weights of products that read the same rows lie one behind the other, and the modules' parameters
are views of them (`stacked`): a weight is there once, and prefills by the modules read the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from r1fast.models.cache import BlockCache, DecodeStep
from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.families import ONE_ROPE
from r1fast.models.gqa import GroupedQueryAttention
from r1fast.models.layers import MLP, HeadFn, Linear, RMSNorm
from r1fast.models.lora import is_adapter
from r1fast.models.mla import LatentAttention
from r1fast.models.model_config import ModelConfig
from r1fast.models.moe import MoE, Routing
from r1fast_kernels.decode_attention import decode_attention_counted
from r1fast_kernels.decode_parts import add_rms_norm, rotate_and_write, rotate_latents, swiglu
from r1fast_kernels.dispatch import choose, log_choice
from r1fast_kernels.products import linear


class Joined:
    """Linear layers that read the same rows: one product while their weights are stacked, else one each.

    Stacked, the layers' weights are views of one. What they were in gives its bytes up meanwhile, and is the same
    storage again behind it: FSDP knows its gathered weights by theirs.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.before: list[Tensor] = []  # the layers' weights, as they were

    def __call__(self, x_BD: Tensor) -> Tensor:
        if self.weight is None:
            return torch.cat([linear(x_BD, layer.weight, layer.bias) for layer in self.layers], dim=1)
        return linear(x_BD, self.weight, self.bias)

    def stack(self) -> None:
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        if any(bias is not None for bias in biases):
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.data for w, b in zip(weights, biases)])
        self.before = [weight.data for weight in weights]
        # A weight that is a part of something else keeps its bytes: others read them.
        whole = [x for x in self.before if x.untyped_storage().nbytes() == x.nbytes]
        self.weight = torch.cat(self.before)
        for weight, part in zip(weights, self._parts(self.weight)):
            weight.data = part
        for x in whole:
            x.untyped_storage().resize_(0)

    def restore(self) -> None:
        """What `stack` has done of its work, undone; all of it again where this itself was interrupted."""
        parts = () if self.weight is None else self._parts(self.weight)
        for layer, whole, part in zip(self.layers, self.before, parts):
            if not whole.untyped_storage().nbytes():
                whole.untyped_storage().resize_(whole.nbytes)
            layer.weight.data = whole.copy_(part)
        self.weight = self.bias = None
        self.before = []

    def _parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight.split([len(x) for x in self.before])


class _Grouped:
    def __init__(self, attention: GroupedQueryAttention) -> None:
        self.attention = attention
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj])

    def __call__(self, normed_BD: Tensor, step: DecodeStep, finished: Tensor) -> Tensor:
        attention = self.attention
        k_SKd, v_SKd = step.cache.layers[attention.layer_idx]
        rope = None if attention.rope is None else step.ropes[attention.rope]
        norms = attention.q_norm, attention.k_norm
        q_BHd = rotate_and_write(
            self.qkv(normed_BD),
            (k_SKd, v_SKd),
            step.slots_B,
            rope=None if rope is None else (rope.cos_TR, rope.sin_TR),
            norms=None if norms[0] is None or norms[1] is None else (norms[0].weight, norms[1].weight),
            eps=0.0 if norms[0] is None else norms[0].eps,
        )
        where = (q_BHd, k_SKd, v_SKd, step.block_table_BN, step.lengths_B)
        out_BHd = decode_attention_counted(*where, scale=attention.scale, window=attention.window, finished=finished)
        return attention.o_proj(out_BHd.flatten(1))


class _Latent:
    """As LatentAttention.decode. Behind q_lora the two projections of x stay apart: its norm would want a copy."""

    def __init__(self, attention: LatentAttention) -> None:
        self.attention = attention
        whole = [] if attention.has_q_lora else [attention.q_proj]
        self.qkv = Joined([*whole, attention.kv_a_proj_with_mqa])

    def __call__(self, normed_BD: Tensor, step: DecodeStep, finished: Tensor) -> Tensor:
        attention, rope = self.attention, step.ropes[ONE_ROPE]
        if attention.has_q_lora:
            q_BX = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normed_BD)))
            kv_BC = self.qkv(normed_BD)
        else:
            kv_width = attention.latent_dim + attention.rope_dim
            both = self.qkv(normed_BD)
            q_BX, kv_BC = both.split((both.shape[1] - kv_width, kv_width), dim=1)
        q_BHd = q_BX.unflatten(1, (attention.num_heads, -1))
        (k_S1C,) = step.cache.layers[attention.layer_idx]
        norm = attention.kv_a_layernorm
        q_BHC = rotate_latents(
            q_BHd, kv_BC, k_S1C, step.slots_B, rope=(rope.cos_TR, rope.sin_TR, rope.interleaved), norm_C=norm.weight,
            eps=norm.eps,
        )  # fmt: skip
        # Both factors are strided views of the live weight, both results of what they are a part of: no copies.
        up_HdC = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
        up_k_HnC, up_v_HvC = up_HdC.split((attention.nope_dim, attention.value_dim), dim=1)
        q_nope_HBn = q_BHd[..., : attention.nope_dim].transpose(0, 1)
        torch.bmm(q_nope_HBn, up_k_HnC, out=q_BHC[..., : attention.latent_dim].transpose(0, 1))
        where = (q_BHC, k_S1C, k_S1C[..., : attention.latent_dim], step.block_table_BN, step.lengths_B)
        latent_BHC = decode_attention_counted(*where, scale=attention.scale, window=None, finished=finished)
        out_BHv = latent_BHC.new_empty(*latent_BHC.shape[:2], attention.value_dim)
        torch.bmm(latent_BHC.transpose(0, 1), up_v_HvC.mT, out=out_BHv.transpose(0, 1))
        return attention.o_proj(out_BHv.flatten(1))


class _Layer:
    def __init__(self, layer: DecoderLayer) -> None:
        self.mlp = layer.mlp
        self.norms: list[RMSNorm] = [getattr(layer, name) for name in layer.norm_names if name is not None]
        attention = layer.self_attn
        self.attend = _Latent(attention) if isinstance(attention, LatentAttention) else _Grouped(attention)
        # The layer's own, or that of the shared experts.
        self.dense = layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.shared_experts
        self.gate_up = None if self.dense is None else Joined([self.dense.gate_proj, self.dense.up_proj])

    @property
    def joined(self) -> list[Joined]:
        found = [self.attend.qkv] if self.gate_up is None else [self.attend.qkv, self.gate_up]
        return [x for x in found if len(x.layers) > 1]

    def feed(self, normed_BD: Tensor) -> tuple[Tensor, Routing | None]:
        """As MLP.forward, or MoE.forward."""
        dense_BD = None
        if self.dense is not None and self.gate_up is not None:
            dense_BD = self.dense.down_proj(swiglu(self.gate_up(normed_BD)))
        if not isinstance(self.mlp, MoE):
            return cast(Tensor, dense_BD), None
        expert_ids_BK, weights_BK, _ = self.mlp.gate(normed_BD)
        out_BD = self.mlp.experts(normed_BD, expert_ids_BK, weights_BK)
        if dense_BD is not None:
            if self.mlp.shared_expert_gate is not None:
                dense_BD = self.mlp.shared_expert_gate(normed_BD).sigmoid() * dense_BD
            out_BD = out_BD + dense_BD
        return out_BD, Routing(expert_ids_BK, None)


class FusedDecode:
    """Called as the decoder is, by what generates."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.layers = [_Layer(cast(DecoderLayer, layer)) for layer in model.layers]
        self.joined = [joined for layer in self.layers for joined in layer.joined]

    def stacking(self) -> Iterator[None]:
        """For a loop of one turn, in which products are joined. Weights must not change meanwhile; `stacked_bytes` more
        at its begin and end.

        A signal may end it at any line, also of what gives the weights back: that is then done once more. Left by an
        exception, a loop lets go of its iterator, which ends at once; `with` would call contextlib before, where a
        signal can keep it from coming here.
        """
        try:
            for joined in self.joined:
                joined.stack()
            yield
        finally:
            try:
                self._restore()
            except BaseException:
                self._restore()
                raise

    @contextmanager
    def stacked(self) -> Iterator[None]:
        """`stacking`, where no signal comes."""
        yield from self.stacking()

    def _restore(self) -> None:
        for joined in self.joined:
            joined.restore()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Prefill, by the modules."""
        return self.model(*args, **options)

    @torch.no_grad()
    def decode(
        self,
        input_ids_B: Tensor,
        positions_B: Tensor,
        cache: BlockCache,
        block_table_BN: Tensor,
        *,
        head: HeadFn | None = None,
        with_routing: bool = False,
    ) -> Any:
        """As Decoder.decode."""
        model, routings = self.model, list[Tensor]()
        # `forward` itself, past hooks: as in Decoder.decode.
        x_BD = model.embed_tokens.forward(input_ids_B)
        ropes = model.rotary(positions_B, positions_B + 1, x_BD.dtype)
        step = DecodeStep(positions_B, block_table_BN, ropes, cache)
        finished = step.lengths_B.new_zeros(len(input_ids_B) * model.config.num_attention_heads)
        last_BD: Tensor | None = None
        for layer in self.layers:
            before, after = layer.norms
            x_BD, normed_BD = _add(x_BD, last_BD, before)
            x_BD, normed_BD = _add(x_BD, layer.attend(normed_BD, step, finished), after)
            last_BD, of_layer = layer.feed(normed_BD)
            routings += [] if of_layer is None else [of_layer.expert_ids]
        result = model.head.forward(_add(x_BD, last_BD, model.norm)[1], head)
        routing = Routing(torch.stack(routings, dim=1), None) if routings else None
        return (result, routing) if with_routing else result


def can_fuse(model: Decoder) -> bool:
    """False: run the modules (`use` says so, or for the weights' dtypes). Logged once."""
    if len(dtypes := {p.dtype for name, p in model.named_parameters() if not is_adapter(name)}) > 1:
        log_choice("decode_layers", "reference", f"the modules for weights in {', '.join(sorted(map(str, dtypes)))}")
        return False
    return choose("decode_layers", None, model.embed_tokens.weight)[0] == "triton"


def _add(x_BD: Tensor, delta_BD: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    if delta_BD is None:
        return x_BD, norm.forward(x_BD)
    return add_rms_norm(x_BD, delta_BD, norm.weight, eps=norm.eps)


def stacked_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What FusedDecode.stacked takes while it begins and ends: the largest of its joined weights, a second time."""
    heads, joined = config.num_attention_heads, [0]
    if not config.uses_mla:
        joined.append((heads + 2 * config.kv_heads) * config.attention_head_dim)
    elif config.q_lora_rank is None:
        query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        joined.append(query + config.kv_lora_rank + config.qk_rope_head_dim)
    is_moe = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
    joined += [2 * config.intermediate_size] * (not all(is_moe)) + [2 * config.shared_width] * any(is_moe)
    return max(joined) * config.hidden_size * dtype.itemsize
