"""Draw one token per row from logits.

    p = softmax(logits / temperature), cut to the `top_k` largest, then to the smallest set of mass >= `top_p` of these
    token = the first v with cdf(v) > u,  u = splitmix64(seed) / 2^64;   log-prob under p before both cuts

Memory-bound: reads 4 B V bytes; this version writes 12 B V more (weights and their fp64 running sums).
"""

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype


def _uniform(seeds_B: Tensor) -> Tensor:
    """One fp64 number in [0, 1) per seed: splitmix64 (Steele et al., 2014) in wrapping int64, its top 52 bits."""

    def xor_shift(x: Tensor, bits: int) -> Tensor:
        return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))  # >> on int64 copies the sign: mask it off

    x = seeds_B + (0x9E3779B97F4A7C15 - (1 << 64))
    x = xor_shift(x, 30) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = xor_shift(x, 27) * (0x94D049BB133111EB - (1 << 64))
    x = xor_shift(x, 31)
    # 52 bits and not 53: u * total must stay below total after rounding, else the search runs off the end.
    return ((x >> 12) & ((1 << 52) - 1)).to(torch.float64) * 2.0**-52


def _draw(weights_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, total): the inverse of the running sum. fp64: in fp32, tokens of a 150k vocabulary would merge."""
    cdf_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    total_B = cdf_BV[:, -1]
    # right=True: the first v with cdf(v) > target, so that a token of probability 0 is never drawn.
    ids_B = torch.searchsorted(cdf_BV, (uniform_B * total_B)[:, None], right=True).squeeze(1)
    return ids_B.clamp(max=weights_BV.shape[1] - 1), total_B  # only a row of NaN is clamped


def sample_tokens_reference(
    logits_BV: Tensor, temperature: float, top_k: int, top_p: float, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification for temperature > 0. Every step works row by row: a row's draw ignores its neighbours."""
    z_BV = logits_BV / temperature
    z_BV = z_BV - z_BV.amax(-1, keepdim=True)
    truncated = 0 < top_k < z_BV.shape[1] or top_p < 1.0
    if not truncated:
        ids_B, total_B = _draw(z_BV.exp(), uniform_B)
    else:
        sorted_BV, order_BV = z_BV.sort(dim=-1, descending=True, stable=True)
        weights_BV = sorted_BV.exp()
        total_B = weights_BV.cumsum(-1, dtype=torch.float64)[:, -1]
        if top_k > 0:
            weights_BV[:, top_k:] = 0
        cdf_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        # A token stays while the mass before it is short of top_p; the first always does.
        outside_BV = (cdf_BV - weights_BV) >= top_p * cdf_BV[:, -1:]
        outside_BV[:, 0] = False
        ranks_B, _ = _draw(weights_BV.masked_fill(outside_BV, 0), uniform_B)
        ids_B = order_BV.gather(1, ranks_B[:, None]).squeeze(1)
    logprobs_B = z_BV.gather(1, ids_B[:, None]).squeeze(1) - total_B.log()
    return ids_B, logprobs_B


@torch.no_grad()
def sample_tokens(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds_B: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row; what a row draws depends on its seed and its logits alone.

    logits_BV     [B, V], any float dtype; -inf marks a token that cannot be drawn
    temperature   0 = greedy (the largest logit, ties to the lowest id)
    top_k, top_p  0 and 1.0 turn them off; top_k first, then top_p on what is left, renormalised
    seeds_B       [B] int64, one already-mixed seed per row; None draws them from torch's generator
    Returns ids_B int64 and logprobs_B fp32: of the tempered distribution before truncation, of the untempered one when
    greedy (what a trainer computes for the same token, so that their ratio is 1).
    """
    if logits_BV.dim() != 2 or (seeds_B is not None and seeds_B.shape != logits_BV.shape[:1]):
        seeds_shape = None if seeds_B is None else tuple(seeds_B.shape)
        raise ValueError(
            f"sample_tokens: got logits {tuple(logits_BV.shape)} and seeds {seeds_shape}, expected [B, V] and [B]"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"sample_tokens: got temperature={temperature}, top_k={top_k}, top_p={top_p}, expected temperature >= 0, "
            "top_k >= 0 (0 = off) and 0 < top_p <= 1"
        )
    choose("sample_tokens", impl, logits_BV)
    logits_BV = logits_BV.to(compute_dtype(logits_BV))
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, logits_BV.log_softmax(-1).gather(1, ids_B[:, None]).squeeze(1).float()
    if seeds_B is None:
        seeds_B = torch.randint(1 << 62, logits_BV.shape[:1], device=logits_BV.device)
    ids_B, logprobs_B = sample_tokens_reference(logits_BV, temperature, top_k, top_p, _uniform(seeds_B))
    return ids_B, logprobs_B.float()
