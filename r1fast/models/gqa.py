"""Grouped-query attention, of every family but DeepSeek's."""

from torch import Tensor, nn

from r1fast.models.attention import ForwardPass, packed_attention
from r1fast.models.cache import DecodeStep
from r1fast.models.layers import Linear, RMSNorm
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import rotate, softmax_scale
from r1fast_kernels import decode_attention


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        width, head_dim, family = config.hidden_size, config.attention_head_dim, config.family
        bias = config.attention_bias or family.qkv_bias
        self.layer_idx, self.head_dim, self.scale = layer_idx, head_dim, softmax_scale(config)
        self.rope, self.window = config.layer(layer_idx).rope, config.layer(layer_idx).window
        self.soft_cap = config.attn_logit_softcapping
        # Where the first channels alone are rotated, they are taken to the end: there every op rotates.
        self.rolled = config.rope_dim if config.rope_dim < head_dim else 0
        self.q_proj = Linear(width, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(width, config.kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, config.kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head_dim, width, bias=config.attention_bias)
        self.norms_heads = family.qk_norm == "head"
        heads = (1, 1) if self.norms_heads else (config.num_attention_heads, config.kv_heads)
        self.q_norm, self.k_norm = (
            RMSNorm(n * head_dim, config.rms_norm_eps, family.norm_offset) if family.qk_norm else None for n in heads
        )

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        q_THd, k_TKd, v_TKd = self._project(x_TD)
        if step.cache is not None:
            cache, slots_T = step.cache
            cache.write(self.layer_idx, slots_T, rotate(k_TKd, step.ropes, self.rope), v_TKd)
        rope = step.ropes[self.rope] if self.rope else None
        out_THd = packed_attention(
            q_THd, k_TKd, v_TKd, step.plan, rope, self.scale, window=self.window, soft_cap=self.soft_cap
        )
        return self.o_proj(out_THd.flatten(1))

    def decode(self, x_BD: Tensor, step: DecodeStep) -> Tensor:
        q_BHd, k_BKd, v_BKd = self._project(x_BD)
        q_BHd, k_BKd = (rotate(x, step.ropes, self.rope) for x in (q_BHd, k_BKd))
        k_SKd, v_SKd = step.cache.write(self.layer_idx, step.slots_B, k_BKd, v_BKd)
        where = (q_BHd.to(step.cache.dtype), k_SKd, v_SKd, step.block_table_BN, step.lengths_B)
        out_BHd = decode_attention(*where, scale=self.scale, window=self.window, soft_cap=self.soft_cap)
        return self.o_proj(out_BHd.flatten(1).to(x_BD.dtype))

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x_TD) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None and not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rolled:
            q, k = (x.roll(-self.rolled, dims=-1) for x in (q, k))
        return q, k, v
