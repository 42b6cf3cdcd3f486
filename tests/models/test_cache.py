"""How much a token takes, and what a block is."""

import torch

from r1fast.models.cache import BlockCache, DecodeStep
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import Rotary

GQA = ModelConfig("llama", 11, 16, 8, 2, 4, num_key_value_heads=2)
MLA = ModelConfig(
    "deepseek_v3", 11, 16, 8, 2, 4, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
    first_k_dense_replace=2,
)  # fmt: skip


def test_memory_per_token() -> None:
    """MLA keeps one latent and the shared rotary key per layer, GQA keys and values of each kv head."""
    for config, values in ((MLA, 6 + 2), (GQA, 2 * 2 * 4)):
        cache = BlockCache(config, 3, torch.bfloat16, "cpu")
        total = sum(buffer.nbytes for layer in cache.layers for buffer in layer)
        assert total == 3 * BlockCache.bytes_per_block(config, torch.bfloat16) == 3 * 16 * 2 * 2 * values


def test_a_token_goes_into_the_block_of_its_place() -> None:
    table = torch.tensor([[4, 2], [0, 1]], dtype=torch.int32)
    cache = BlockCache(MLA, 5, torch.float32, "cpu")
    places = torch.tensor([17, 3])
    step = DecodeStep(places, table, Rotary(MLA)(places, places + 1, torch.float32), cache)
    assert step.slots_B.tolist() == [2 * 16 + 1, 3] and step.lengths_B.tolist() == [18, 4]


def test_write_and_copy() -> None:
    cache = BlockCache(MLA, 2, torch.float32, "cpu")
    for (buffer,) in cache.layers:
        buffer.zero_()
    cache.write(1, torch.tensor([3, 5]), torch.ones(2, 1, 8))
    cache.copy_blocks(torch.tensor([0]), torch.tensor([1]))
    (first,), (second,) = cache.layers
    assert not first.any() and second.sum((1, 2)).nonzero().flatten().tolist() == [3, 5, 19, 21]
