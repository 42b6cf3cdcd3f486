"""Keys and values of generation, in blocks of 16 tokens that sequences hold and may share.

GQA layers keep keys and values [slots, K, d]; MLA layers one latent per token, [slots, 1, kv_lora + rope]: the normed
compressed kv beside the rotated shared key. For DeepSeek-V3 that is 576 values per token and layer, not 40,960. Slot
16 b + i is token i of block b. Which blocks a sequence has is the caller's (rollout/blocks.py).
"""

import os

import torch
from torch import Tensor

from r1fast import host_memory
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import Ropes
from r1fast_kernels.decode_attention import BLOCK


class BlockCache:
    """`num_blocks` blocks for every layer. Nothing is cleared: a slot is read only after it was written."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.num_blocks, self.dtype = num_blocks, dtype
        # Per layer (latent,) or (keys, values).
        self.layers = [
            tuple(torch.empty(num_blocks * BLOCK, *shape, dtype=dtype, device=device) for shape in _shapes(config))
            for _ in range(config.num_hidden_layers)
        ]
        self.buffers = [buffer for layer in self.layers for buffer in layer]

    @staticmethod
    def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
        values = sum(heads * width for heads, width in _shapes(config))
        return BLOCK * config.num_hidden_layers * values * dtype.itemsize

    def write(self, layer_idx: int, slots_T: Tensor, *values_T: Tensor) -> tuple[Tensor, ...]:
        """The layer's (latent [T, 1, C],) or (k, v) [T, K, d] go to slots_T; returns the layer's buffers."""
        buffers = self.layers[layer_idx]
        for buffer, values in zip(buffers, values_T, strict=True):
            buffer.index_copy_(0, slots_T, values.to(self.dtype))
        return buffers

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """int64 [n] each: what sequences share up to the middle of a block has to part there."""
        for buffer in self.buffers:
            blocks = buffer.unflatten(0, (-1, BLOCK))
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))


class DecodeStep:
    """What every layer of one decode step shares.

    slots_B: where the new token is written. block_table_BN, lengths_B: int32, of the sequence that it belongs to: its
    blocks, and its tokens, the new one included. ropes: by the names that layers have.
    """

    def __init__(self, positions_B: Tensor, block_table_BN: Tensor, ropes: Ropes, cache: BlockCache) -> None:
        blocks_B = block_table_BN.gather(1, (positions_B // BLOCK)[:, None]).squeeze(1)
        self.slots_B = blocks_B.long() * BLOCK + positions_B % BLOCK
        self.block_table_BN, self.lengths_B = block_table_BN, (positions_B + 1).int()
        self.ropes, self.cache = ropes, cache


def free_memory(device: torch.device) -> int | None:
    """Bytes that a cache on `device` could take now; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    # Each process that torchrun has started here may ask at the same moment.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return host_memory.available(processes) if device.type == "cpu" else None


def _shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Heads and channels of a token, in each buffer of a layer."""
    if config.uses_mla:
        return [(1, config.kv_lora_rank + config.qk_rope_head_dim)]
    return [(config.kv_heads, config.attention_head_dim)] * 2
