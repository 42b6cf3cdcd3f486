"""Room in the cache is checked before anything is written."""

import pytest
import torch

from r1fast.models.attention import AttentionPlan
from r1fast.models.cache import KVCache
from r1fast.models.config import ModelConfig

CONFIG = ModelConfig("llama", 11, 16, 8, 2, 4, num_key_value_heads=2)


def plan_of(lengths: list[int]) -> AttentionPlan:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return AttentionPlan(ends, sum(lengths), torch.device("cpu"))


def test_prefill_must_fit() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, "cpu")
    cache.check_prefill(plan_of([4, 1]))
    with pytest.raises(ValueError, match="prefill of 3 sequences up to 1 tokens into a cache of 2 rows of 4"):
        cache.check_prefill(plan_of([1, 1, 1]))
    with pytest.raises(ValueError, match="up to 5 tokens"):
        cache.check_prefill(plan_of([5]))


def test_a_full_cache_says_so() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, "cpu")
    cache.finish_prefill(plan_of([3, 1]))
    step = cache.begin_step(cache.lengths)
    assert (step.span, step.mask_B1S.isinf().sum((1, 2)).tolist()) == (4, [0, 2])
    cache.finish_step(step)
    assert cache.lengths.tolist() == [4, 2]
    with pytest.raises(ValueError, match="the cache is full: 4 of 4 tokens"):
        cache.begin_step(cache.lengths)
    with pytest.raises(ValueError, match="3 positions for 2 cache rows"):
        cache.begin_step(torch.zeros(3, dtype=torch.int64))


def test_dropping_the_longest_row_makes_room() -> None:
    cache = KVCache(CONFIG, 2, 4, torch.float32, "cpu")
    cache.finish_prefill(plan_of([4, 1]))
    assert cache.select(torch.tensor([1, 1, 1])).begin_step(torch.tensor([1, 1, 1])).span == 2


def test_memory_per_token() -> None:
    """MLA keeps one latent and the shared rotary key per layer, GQA keys and values of each kv head."""
    mla = ModelConfig(
        "deepseek_v3", 11, 16, 8, 2, 4, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
        first_k_dense_replace=2,
    )  # fmt: skip
    for config, values in ((mla, 6 + 2), (CONFIG, 2 * 2 * 4)):
        cache = KVCache(config, 3, 5, torch.float32, "cpu")
        assert sum(buffer.numel() for layer in cache.layers for buffer in layer) == 2 * 3 * 5 * values
