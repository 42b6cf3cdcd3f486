"""ModelConfig: to and from transformers, and from a recipe."""

from typing import Any

import pytest
from transformers import AutoConfig

from r1fast.models.config import ModelConfig

TINY: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 448, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "rope_theta": 1000.0,
}  # fmt: skip


def test_round_trip_through_transformers(checkpoint) -> None:
    config = ModelConfig.from_hf(checkpoint.oracle.config)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_recipe_section() -> None:
    config = ModelConfig.from_dict(TINY)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000.0}
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_router_is_named_for_other_readers() -> None:
    """vLLM knows V3's router by these; without them it takes the softmax of V2."""
    written = ModelConfig.from_dict(TINY).to_hf().to_dict()
    assert (written["scoring_func"], written["topk_method"]) == ("sigmoid", "noaux_tc")


def test_qwen_name_for_experts() -> None:
    dense = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    moe = ("num_experts_per_tok", "moe_intermediate_size")
    values = {name: TINY[name] for name in (*dense, *moe)} | {"model_type": "qwen3_moe", "num_experts": 4}
    assert ModelConfig.from_dict(values).n_routed_experts == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "gpt2"}, "model_type='gpt2', expected one of deepseek_v3"),
        (
            {"model_type": "llama", "num_key_value_heads": 3},
            "num_key_value_heads=3, expected a divisor of num_attention_heads=4",
        ),
        ({"n_group": 3}, "n_group=3, expected a divisor of n_routed_experts=8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9, expected 1 to n_routed_experts=8"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0, expected a positive number for deepseek_v3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope', expected one of default, linear, llama3, yarn"),
        ({"qk_rope_head_dim": 7}, "rotary dimension=7, expected an even number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**TINY, **change})


def test_missing_key() -> None:
    with pytest.raises(ValueError, match="missing vocab_size, hidden_size"):
        ModelConfig.from_dict({"model_type": "llama", "intermediate_size": 3})


def test_sliding_window_is_an_error() -> None:
    hf = AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=128)
    with pytest.raises(ValueError, match="sliding_window=128, expected full attention"):
        ModelConfig.from_hf(hf)
