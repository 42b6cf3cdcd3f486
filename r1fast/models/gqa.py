"""Grouped-query attention of Llama, Qwen2, Qwen3 and Qwen3-MoE."""

from torch import Tensor, nn

from r1fast.models.attention import ForwardPass, packed_attention
from r1fast.models.cache import DecodeStep
from r1fast.models.layers import Linear, RMSNorm
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import softmax_scale
from r1fast_kernels import decode_attention


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.attention_head_dim
        bias = config.attention_bias or config.family.qkv_bias
        self.layer_idx, self.head_dim, self.scale = layer_idx, head_dim, softmax_scale(config)
        self.q_proj = Linear(width, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(width, config.kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, config.kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head_dim, width, bias=config.attention_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.family.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.family.qk_norm else None

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        q_THd, k_TKd, v_TKd = self._project(x_TD)
        if step.cache is not None and step.slots_T is not None:
            step.cache.write(self.layer_idx, step.slots_T, step.rope.rotate(k_TKd), v_TKd)
        out_THd = packed_attention(q_THd, k_TKd, v_TKd, step.plan, step.rope, self.scale)
        return self.o_proj(out_THd.flatten(1))

    def decode(self, x_BD: Tensor, step: DecodeStep) -> Tensor:
        q_BHd, k_BKd, v_BKd = self._project(x_BD)
        k_SKd, v_SKd = step.cache.write(self.layer_idx, step.slots_B, step.rope.rotate(k_BKd), v_BKd)
        q_BHd = step.rope.rotate(q_BHd).to(step.cache.dtype)
        out_BHd = decode_attention(q_BHd, k_SKd, v_SKd, step.block_table_BN, step.lengths_B, scale=self.scale)
        return self.o_proj(out_BHd.flatten(1).to(x_BD.dtype))

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
