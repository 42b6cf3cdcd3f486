"""r1fast as an experts implementation of transformers: whole models, logits and every gradient."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from r1fast_kernels import hf

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek_v3": DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        moe_intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=7, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=5, num_experts_per_tok=2),
}  # fmt: skip


def run(config: PretrainedConfig, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation=implementation, attn_implementation="eager"
    )
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    logits = model(ids, labels=ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model_equals_eager(family: str) -> None:
    hf.register()
    hf.register()
    logits, gradients = run(CONFIGS[family], "r1fast")
    want_logits, want = run(CONFIGS[family], "eager")
    torch.testing.assert_close(logits, want_logits, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == want.keys() and sum("experts" in name for name in want) >= 2
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_what_is_not_taken_is_said() -> None:
    hf.register()
    config = GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="r1fast")
    with pytest.raises(ValueError, match=r'does not take GptOssExperts: its experts have biases.*Use "grouped_mm"'):
        model(torch.zeros(1, 3, dtype=torch.int64))
