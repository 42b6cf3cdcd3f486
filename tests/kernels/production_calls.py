"""Every op that has Triton kernels, as a step of a 1.5B or of a 30B-A3B model calls it: CALLS[name](rows)() runs it.

rows: tokens of a micro-batch, samples of a rollout, sequences that decode; of "decode_attention, longer" the blocks of
the longest sequence. Tensors are made by the first call, so in `fake_gpu` they have no values.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import r1fast_kernels as kernels
from tests.kernels.backends import BF16
from tests.kernels.launch_cases import INT32, INT64, new

VOCAB, WIDTH = 151_936, 1536  # Qwen2.5-1.5B
EXPERTS, TOP_K, EXPERTS_WIDTH, INNER = 128, 8, 2048, 768  # Qwen3-30B-A3B
Call = Callable[[], Any]


def num_samples(num_tokens: int) -> int:
    return max(1, num_tokens // 512)


def selective_logprobs(num_tokens: int) -> Call:
    logits, ids = new(num_tokens, VOCAB, dtype=BF16, learns=True), new(num_tokens, dtype=INT64)
    return lambda: kernels.selective_logprobs(logits, ids, with_entropy=True)


def of_head(op: str) -> Callable[[int], Call]:
    def make(num_tokens: int) -> Call:
        hidden, weight = new(num_tokens, WIDTH, dtype=BF16, learns=True), new(VOCAB, WIDTH, dtype=BF16, learns=True)
        ids, N = new(num_tokens, dtype=INT64), num_samples(num_tokens)
        if op == "logprobs":
            return lambda: kernels.linear_logprobs(hidden, weight, ids, with_entropy=True)
        if op == "cross_entropy":
            return lambda: kernels.linear_cross_entropy(hidden, weight, ids, ignore_index=None)
        cu_seqlens, advantages, old = new(N + 1, dtype=INT32), new(N), new(num_tokens)
        return lambda: kernels.linear_grpo_loss(
            hidden, weight, ids, cu_seqlens, advantages_N=advantages, old_logprobs_T=old
        )[0]

    return make


def grpo_loss(num_tokens: int) -> Call:
    N = num_samples(num_tokens)
    logprobs, old, ref = new(num_tokens, learns=True), new(num_tokens), new(num_tokens)
    cu_seqlens, advantages = new(N + 1, dtype=INT32), new(N)
    return lambda: kernels.grpo_loss(
        logprobs, cu_seqlens, advantages_N=advantages, old_logprobs_T=old, ref_logprobs_T=ref, beta=0.1
    )[0]


def group_advantages(num_rewards: int) -> Call:
    rewards, group_ids = new(num_rewards), new(num_rewards, dtype=INT64)
    return lambda: kernels.group_advantages(rewards, group_ids)


def sample_tokens(**how: Any) -> Callable[[int], Call]:
    def make(num_rows: int) -> Call:
        logits, seeds = new(num_rows, VOCAB, dtype=BF16), new(num_rows, dtype=INT64)
        return lambda: kernels.sample_tokens(logits, seeds_B=seeds, **how)

    return make


def route_topk(num_tokens: int) -> Call:
    logits = new(num_tokens, EXPERTS, learns=True)
    return lambda: kernels.route_topk(logits, None, top_k=TOP_K, norm_topk_prob=True, scoring="softmax")[1]


def moe_dispatch(num_tokens: int) -> Call:
    ids = new(num_tokens, TOP_K, dtype=INT64)
    return lambda: kernels.moe_dispatch(ids, EXPERTS)


def grouped_gemm(num_tokens: int) -> Call:
    x = new(num_tokens * TOP_K, EXPERTS_WIDTH, dtype=BF16, learns=True)
    weight, offsets = new(EXPERTS, INNER, EXPERTS_WIDTH, dtype=BF16, learns=True), new(EXPERTS, dtype=INT32)
    return lambda: kernels.grouped_gemm(x, weight, offsets)


def moe_experts(num_tokens: int) -> Call:
    hidden = new(num_tokens, EXPERTS_WIDTH, dtype=BF16, learns=True)
    gate_up = new(EXPERTS, 2 * INNER, EXPERTS_WIDTH, dtype=BF16, learns=True)
    down = new(EXPERTS, EXPERTS_WIDTH, INNER, dtype=BF16, learns=True)
    ids, weights = new(num_tokens, TOP_K, dtype=INT64), new(num_tokens, TOP_K, learns=True)
    return lambda: kernels.moe_experts(hidden, gate_up, down, ids, weights)


def attend(num_rows: int, num_blocks: int, num_heads: int, num_kv_heads: int, width: int, latent: int = 0) -> Call:
    """latent: channels of the keys that are the values."""
    keys = new(1 << 18, num_kv_heads, width, dtype=BF16)
    values: Tensor = keys[..., :latent] if latent else new(1 << 18, num_kv_heads, width, dtype=BF16)
    q, table, lengths = (
        new(num_rows, num_heads, width, dtype=BF16), new(num_rows, num_blocks, dtype=INT32), new(num_rows, dtype=INT32)
    )  # fmt: skip
    return lambda: kernels.decode_attention(q, keys, values, table, lengths, scale=0.1)


# Names that end in this: large products in bf16 are torch's, as on a Hopper GPU.
ON_HOPPER = ", on Hopper"
CALLS: dict[str, Callable[[int], Call]] = {
    "selective_logprobs": selective_logprobs,
    "linear_logprobs": of_head("logprobs"),
    "linear_cross_entropy": of_head("cross_entropy"),
    "linear_grpo_loss": of_head("grpo_loss"),
    "grpo_loss": grpo_loss,
    "group_advantages": group_advantages,
    "sample_tokens": sample_tokens(),
    "sample_tokens, top_k": sample_tokens(top_k=50),
    "sample_tokens, top_p": sample_tokens(top_p=0.95),
    "route_topk": route_topk,
    "moe_dispatch": moe_dispatch,
    "grouped_gemm": grouped_gemm,
    f"grouped_gemm{ON_HOPPER}": grouped_gemm,
    "moe_experts": moe_experts,
    f"moe_experts{ON_HOPPER}": moe_experts,
    "decode_attention": lambda rows: attend(rows, 256, 12, 2, 128),
    "decode_attention, latents": lambda rows: attend(rows, 256, 16, 1, 576, 512),
    "decode_attention, longer": lambda blocks: attend(256, blocks, 12, 2, 128),
}
