"""Multi-head latent attention of DeepSeek-V2 and V3 (arXiv:2405.04434; 2412.19437, section 2.1.1).

    c = norm(W_DKV x)   k_nope, v = W_UK c, W_UV c   k_pe = rope(W_KR x), one for all heads   k = [k_nope | k_pe]
Training and prefill expand keys and values per head. Decoding never does: q_nope . (W_UK c) = (W_UK^T q_nope) . c, so
queries are taken to the latent space, attention runs over the cached latents, and W_UV is applied to its result.
"""

import torch
from torch import Tensor, nn

from r1fast.models.attention import ForwardPass, packed_attention
from r1fast.models.cache import DecodeStep
from r1fast.models.families import ONE_ROPE
from r1fast.models.layers import Linear, RMSNorm
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import Rope, softmax_scale
from r1fast_kernels import decode_attention

# transformers builds both latent norms with their class default, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.layer_idx, self.scale = layer_idx, softmax_scale(config)
        self.num_heads, self.latent_dim = config.num_attention_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.has_q_lora = config.q_lora_rank is not None
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if config.q_lora_rank is not None:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        else:
            self.q_proj = Linear(width, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, self.latent_dim + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent_dim, self.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = Linear(self.num_heads * self.value_dim, width, bias=bias)

    def forward(self, x_TD: Tensor, step: ForwardPass) -> Tensor:
        q_THd, (latent_TC, k_pe_TR) = self._queries(x_TD), self._latents(x_TD)
        if step.cache is not None:
            cache, slots_T = step.cache
            cache.write(self.layer_idx, slots_T, self._cached(latent_TC, k_pe_TR, step.ropes[ONE_ROPE]))
        kv_THd = self.kv_b_proj(latent_TC).unflatten(-1, (self.num_heads, -1))
        k_nope_THd, v_THd = kv_THd.split((self.nope_dim, self.value_dim), dim=-1)
        out_THd = packed_attention(
            q_THd, k_nope_THd, v_THd, step.plan, step.ropes[ONE_ROPE], self.scale, k_pe_TR=k_pe_TR
        )
        return self.o_proj(out_THd.flatten(1))

    def decode(self, x_BD: Tensor, step: DecodeStep) -> Tensor:
        q_BHd, (latent_BC, k_pe_BR) = step.ropes[ONE_ROPE].rotate(self._queries(x_BD)), self._latents(x_BD)
        q_nope_BHn, q_pe_BHR = q_BHd.split((self.nope_dim, self.rope_dim), dim=-1)
        # Both factors are strided views of the live weight: a copy would go stale at the next optimizer step.
        up_HdC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_k_HnC, up_v_HvC = up_HdC.split((self.nope_dim, self.value_dim), dim=1)
        q_latent_BHC = torch.bmm(q_nope_BHn.transpose(0, 1), up_k_HnC).transpose(0, 1)
        q_BHC = torch.cat((q_latent_BHC, q_pe_BHR), dim=-1).to(step.cache.dtype)
        (k_S1C,) = step.cache.write(
            self.layer_idx, step.slots_B, self._cached(latent_BC, k_pe_BR, step.ropes[ONE_ROPE])
        )
        v_S1C = k_S1C[..., : self.latent_dim]
        out_BHC = decode_attention(q_BHC, k_S1C, v_S1C, step.block_table_BN, step.lengths_B, scale=self.scale)
        out_HBv = torch.bmm(out_BHC.to(x_BD.dtype).transpose(0, 1), up_v_HvC.transpose(1, 2))
        return self.o_proj(out_HBv.transpose(0, 1).flatten(1))

    def _queries(self, x_TD: Tensor) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))) if self.has_q_lora else self.q_proj(x_TD)
        return q.unflatten(-1, (self.num_heads, -1))

    def _latents(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        latent_TC, k_pe_TR = self.kv_a_proj_with_mqa(x_TD).split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent_TC), k_pe_TR

    def _cached(self, latent_TC: Tensor, k_pe_TR: Tensor, rope: Rope) -> Tensor:
        return torch.cat((latent_TC[:, None], rope.rotate(k_pe_TR[:, None])), dim=-1)
