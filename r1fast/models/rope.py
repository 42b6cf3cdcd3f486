"""Rotary position embedding: frequencies (default, linear, llama3, YaRN, LongRoPE) and the rotation itself.

The rotation of pair i at position p is [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin] at angle p * inv_freq[i].
Llama and Qwen pair channel i with i + R/2; DeepSeek-V3 pairs neighbours (2i, 2i + 1) and, as in transformers, the
rotated halves come out de-interleaved: queries and keys are permuted alike, so scores do not change.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from r1fast.models.families import ONE_ROPE
from r1fast.models.model_config import ModelConfig


class Rope(NamedTuple):
    """cos and sin of every token, [T, R/2], in the compute dtype."""

    cos_TR: Tensor
    sin_TR: Tensor
    interleaved: bool

    def rotate(self, x_THd: Tensor) -> Tensor:
        """Rotate the last R channels of each head; the channels before them pass through."""
        return _Rotate.apply(x_THd, self.cos_TR[:, None], self.sin_TR[:, None], self.interleaved)


Ropes = dict[str, Rope]


def rotate(x_THd: Tensor, ropes: Ropes, name: str | None) -> Tensor:
    return x_THd if name is None else ropes[name].rotate(x_THd)


class Rotary(nn.Module):
    """Holds the inverse frequencies in fp32, whatever dtype or device the model is moved to.

    One buffer for each of config.ropes, in that order: `inv_freq`, `inv_freq_1`, ..
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.interleaved = config.uses_mla and config.rope_interleave
        found = [rope_frequencies(config, name) for name in config.ropes]
        self.attention_factors = tuple(factor for _, factor in found)
        self.names = tuple(f"inv_freq_{i}" if i else "inv_freq" for i in range(len(found)))
        for name, (inv_freq, _) in zip(self.names, found, strict=True):
            self.register_buffer(name, inv_freq.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rotary":
        # to(bfloat16) would round the frequencies and to_empty leaves garbage: compute them anew on fn's device.
        super()._apply(fn, recurse)
        for name, rope in zip(self.names, self.config.ropes, strict=True):
            if not getattr(self, name).is_meta:
                setattr(self, name, rope_frequencies(self.config, rope)[0].to(getattr(self, name).device))
        return self

    def forward(self, positions_T: Tensor, lengths_T: Tensor, dtype: torch.dtype) -> Ropes:
        """lengths_T: tokens of the sequence that a token is in. Of every rotary embedding, by its name."""
        ropes: Ropes = {}
        for (rope, values), name, factor in zip(
            self.config.ropes.items(), self.names, self.attention_factors, strict=True
        ):
            inv_freq = getattr(self, name)
            if values["rope_type"] == "longrope":  # as transformers: all of a sequence, by its length
                is_long_T1 = (lengths_T > values["original_max_position_embeddings"])[:, None]
                inv_freq = torch.where(is_long_T1, inv_freq[1], inv_freq[0])
            angles_TR = positions_T.float()[:, None] * inv_freq
            cos, sin = angles_TR.cos() * factor, angles_TR.sin() * factor
            ropes[rope] = Rope(cos.to(dtype), sin.to(dtype), self.interleaved)
        return ropes


class _Rotate(torch.autograd.Function):
    """One node instead of nine: the backward of a rotation is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        passed, x1, x2 = _split(x, 2 * cos.shape[-1], interleaved)
        return torch.cat((passed, torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        passed, g1, g2 = _split(grads[0], 2 * cos.shape[-1], False)
        dx1, dx2 = torch.addcmul(g1 * cos, g2, sin), torch.addcmul(g2 * cos, g1, sin, value=-1)
        rotated = torch.stack((dx1, dx2), dim=-1).flatten(-2) if ctx.interleaved else torch.cat((dx1, dx2), dim=-1)
        grad = torch.cat((passed, rotated), dim=-1) if passed.shape[-1] else rotated
        return grad, None, None, None


def _split(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    passed, x = x.split((x.shape[-1] - rotary_dim, rotary_dim), dim=-1)
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return passed, x1, x2


def rope_frequencies(config: ModelConfig, name: str = ONE_ROPE) -> tuple[Tensor, float]:
    """Inverse frequencies [R/2] (fp32, CPU) and the factor on cos and sin, as transformers computes them.

    LongRoPE has two: [2, R/2], of sequences up to the length of pretraining and of longer ones.
    """
    rope, dim = config.ropes[name], config.rope_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope["rope_type"] == "yarn":
        return _yarn(inv_freq, rope, dim)
    if rope["rope_type"] == "longrope":
        return _longrope(inv_freq, rope, config.max_position_embeddings)
    return inv_freq, 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head dim), or what a model says in its place; DeepSeek multiplies it by mscale^2 when YaRN sets
    mscale_all_dim."""
    if not config.uses_mla:
        return float(config.query_pre_attn_scalar or config.attention_head_dim) ** -0.5
    rope, scale = config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if rope.get("mscale_all_dim"):
        scale *= _yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def _llama3(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by factor, short ones kept, those between interpolated."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / rope["factor"] + smooth * inv_freq


def _yarn(inv_freq: Tensor, rope: dict[str, Any], dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolate the channels that turn less than beta_slow times, keep the fast ones."""

    def channel(rotations: float) -> float:
        context = rope["original_max_position_embeddings"]
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    factor = rope["factor"]
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _yarn_mscale(factor, rope["mscale"]) / _yarn_mscale(factor, rope["mscale_all_dim"])
    elif attention_factor is None:
        attention_factor = _yarn_mscale(factor)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), attention_factor


def _longrope(inv_freq: Tensor, rope: dict[str, Any], max_position_embeddings: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv:2402.13753): a divisor of each frequency, of short and of long sequences."""
    original = rope["original_max_position_embeddings"]
    divisors = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32, device="cpu")
    factor, attention_factor = rope.get("factor") or max_position_embeddings / original, rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return inv_freq / divisors, attention_factor


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
