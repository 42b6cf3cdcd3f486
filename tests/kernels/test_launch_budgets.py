"""How many kernels a GPU would run: a decode step, by layer. What counts: fake_gpu.py's `kernels`.

Each operator of torch that is no view and no allocation is one kernel, as is each Triton launch.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast_kernels import dispatch
from tests.kernels.fake_gpu import fake_gpu

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter asks no driver")

# Of production's sizes: tensors here take no memory.
QWEN: dict[str, Any] = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {  # V2-Lite's sizes, V3's router
    "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 10_944, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 102_400, "max_position_embeddings": 32_768, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "first_k_dense_replace": 0, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROWS, BLOCKS = 256, 64
# (a layer of a decode step, all else of the step)
DECODE = {"dense": (QWEN, 10, 20), "latent attention, experts": (DEEPSEEK, 42, 21)}


def decode_kernels(fields: dict[str, Any], num_layers: int) -> list[str]:
    """What a step of 256 rows runs, in order."""
    with fake_gpu() as gpu:
        model = Decoder(ModelConfig.from_dict(fields | {"num_hidden_layers": num_layers}))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu:1"))
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(weight, dtype=torch.bfloat16)))
        cache = BlockCache(model.config, ROWS * BLOCKS, torch.bfloat16, "cpu:1")
        ids_B, positions_B = torch.empty(2, ROWS, dtype=torch.int64)
        table_BN = torch.empty(ROWS, BLOCKS, dtype=torch.int32)
        decoder = fast_decode(model) or model
        with decoder.stacked() if isinstance(decoder, FusedDecode) else nullcontext():
            gpu.kernels.clear()
            decoder.decode(ids_B, positions_B, cache, table_BN)
            return list(gpu.kernels)


@pytest.mark.parametrize("name", DECODE)
def test_a_decode_step_runs_few_kernels(name: str) -> None:
    fields, a_layer, else_ = DECODE[name]
    one, two = (decode_kernels(fields, num_layers) for num_layers in (1, 2))
    assert len(two) - len(one) <= a_layer, two
    assert 2 * len(one) - len(two) <= else_, one
