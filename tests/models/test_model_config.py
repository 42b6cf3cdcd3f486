"""ModelConfig: to and from transformers, and from a recipe."""

from typing import Any

import pytest
from transformers import AutoConfig

from r1fast.models.families import FAMILIES
from r1fast.models.model_config import ModelConfig
from tests import zoo

TINY: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 448, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "rope_theta": 1000.0,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 448, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
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
    assert ModelConfig.from_dict(QWEN3_MOE).n_routed_experts == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_family_reaches_its_checkpoint(family: str) -> None:
    """A field that a recipe may give and an export forgets would be another model after loading."""
    start = {**LLAMA, **zoo.fields(family), "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    start = {name: value for name, value in start.items() if name not in ("layer_types", "no_rope_layers")}
    is_latent = FAMILIES[family].attention == "latent"
    start |= {"n_routed_experts": 8, "num_key_value_heads": 4} if is_latent else {}
    other = {
        "num_key_value_heads": 4 if is_latent else 2, "max_position_embeddings": 99,
        "initializer_range": 0.5, "rms_norm_eps": 1e-3, "tie_word_embeddings": True, "bos_token_id": 3,
        "eos_token_id": [4, 5], "pad_token_id": 6, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}, "q_lora_rank": 12,
        "rope_interleave": False, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
        "norm_topk_prob": start.get("norm_topk_prob") is False, "decoder_sparse_step": 2, "mlp_only_layers": (0,),
        "sliding_window": 77, "layer_types": ("full_attention", "sliding_attention", "full_attention"),
        "no_rope_layers": (0, 1, 0), "query_pre_attn_scalar": 7, "shared_expert_intermediate_size": 18,
        "attn_logit_softcapping": 9,
    }  # fmt: skip
    if family == "phi3":
        other["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25}
    plain = ModelConfig.from_dict(start)
    other["tie_word_embeddings"] = not plain.tie_word_embeddings
    own = [name for name in FAMILIES[family].fields if name in other]
    config = ModelConfig.from_dict({**start, **{name: other[name] for name in own}})
    same = [name for name in own if getattr(config, name) == getattr(plain, name)]
    assert same == (["num_key_value_heads"] if is_latent else [])
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "gpt2"}, "model_type='gpt2', expected one of deepseek_v2, deepseek_v3"),
        ({"n_group": 3}, "n_group=3, expected a divisor of n_routed_experts=8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9, expected 1 to n_routed_experts=8"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0, expected a positive number for deepseek_v3"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic', expected one of default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_parameters.short_factor=None, expected"),
        ({"qk_rope_head_dim": 7}, "rotary dimension=7, expected an even number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**TINY, **change})


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 3}, "num_key_value_heads=3, expected a divisor of num_attention_heads=4"),
    ({"hidden_size": 0}, "hidden_size=0, expected a whole number above 0"),
    ({"hidden_size": 4.57}, "hidden_size=4.57, expected a whole number"),
    ({"hidden_size": 64.0}, "hidden_size=64.0, expected a whole number"),
    ({"hidden_size": "json.dumps"}, "hidden_size='json.dumps', expected a whole number"),
    ({"hidden_size": True}, "hidden_size=True, expected a whole number"),
    ({"hidden_size": None}, "hidden_size=None, expected a whole number"),
    ({"hidden_size": 62}, "num_attention_heads=4, expected a divisor of hidden_size=62, or head_dim"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_attention_heads": 128}, "num_attention_heads=128, expected a divisor of hidden_size=64"),
    ({"num_attention_heads": 64}, "rotary dimension=1, expected an even number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1, expected a whole number, 1 to 10000"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
    ({"intermediate_size": [3]}, r"intermediate_size=\[3\], expected a whole number"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0, expected a number above 0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"initializer_range": 0}, "initializer_range=0, expected a number above 0"),
    ({"initializer_range": 10**400}, "initializer_range=1000"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1, expected true or false"),
    ({"eos_token_id": 448}, "eos_token_id=448, expected 0 to 447, as vocab_size=448"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id="),
    ({"bos_token_id": -1}, "bos_token_id=-1, expected 0 to 447"),
    ({"rope_theta": 0}, "rope_theta=0, expected a number above 1"),
    ({"rope_theta": "10000"}, "rope_theta='10000'"),
    ({"rope_parameters": 3}, "rope_parameters=3, expected a mapping"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type="),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor=None, expected a number"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor=0, expected a number, 1 or"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 3}},
        "beta_fast=3, expected only rope_type, rope_theta",
    ),
    ({"rope_parameters": {"factor": 2}}, "rope_parameters.factor=2, expected only rope_type, rope_theta for def"),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor=4, expected less than high_freq_factor=4",
    ),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_slow": 40}}, "beta_slow=40, expected less than"),
    ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 8.0}}, "rope_theta=9.0, expected one rope_theta"),
    ({"n_routed_experts": 8}, "n_routed_experts does not apply to model_type 'llama'"),
    ({"model_type": "qwen2", "attention_bias": True}, "attention_bias does not apply to model_type 'qwen2'"),
    ({"model_type": ["llama"]}, "model_type="),
    ({"hidden_act": "gelu"}, "unknown key 'hidden_act'"),
    ({"sliding_window": 128}, "sliding_window does not apply to model_type 'llama'"),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}},
        r"short_factor=\[1.0.*expected 8 numbers, one of each pair",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": 1, "long_factor": [0]}},
        "short_factor=1, expected a l",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, expected 1.0"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\], expected a list of 3 of 0 and 1"),
    ({"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 3}, "sliding_window=None, expected a whole"),
    ({"model_type": "gemma3_text", "layer_types": ["full"] * 3}, "layer_types=.*expected a list of 3 of full_att"),
    (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {}, "local": {}}},
        "rope_parameters.local={}, expected only full_attention, sliding_attention",
    ),
    ({"model_type": "mixtral"}, "num_experts_per_tok=0, expected 1 to"),
    ({"model_type": "deepseek_v2", "n_group": 2}, "n_group does not apply to model_type 'deepseek_v2'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_FIELDS, ids=[str(change)[:60] for change, _ in WRONG_FIELDS])
def test_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict({**LLAMA, **change})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        (TINY, {"num_key_value_heads": 2}, "num_key_value_heads=2, expected num_attention_heads=4"),
        (TINY, {"n_group": 4, "topk_group": 5}, "topk_group=5, expected 1 to n_group=4"),
        (TINY, {"n_group": 8, "topk_group": 1}, "n_group=8, expected groups of at least 2 experts"),
        (TINY, {"first_k_dense_replace": 3}, "n_routed_experts=8, expected a layer with experts among the 3"),
        (TINY, {"num_experts": 8}, "expected one of num_experts and n_routed_experts"),
        (TINY, {"n_routed_experts": 40_000}, "n_routed_experts=40000, expected a whole number, 0 to 32767"),
        (TINY, {"routed_scaling_factor": 0}, "routed_scaling_factor=0"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts=0"),
        (QWEN3_MOE, {"mlp_only_layers": [3]}, "mlp_only_layers=3, expected a list of layers, 0 to 2"),
        (QWEN3_MOE, {"mlp_only_layers": 0}, "mlp_only_layers=0, expected a list of layers, 0 to 2"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        (QWEN3_MOE, {"decoder_sparse_step": 4}, "n_routed_experts=8, expected a layer with experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit(start: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**start, **change})


def test_missing_key() -> None:
    with pytest.raises(ValueError, match="missing vocab_size, hidden_size"):
        ModelConfig.from_dict({"model_type": "llama", "intermediate_size": 3})


def test_sliding_window_is_an_error() -> None:
    hf = AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=128)
    with pytest.raises(ValueError, match="sliding_window=128, expected full attention"):
        ModelConfig.from_hf(hf)
