"""config.json of published models of our families, cut in depth alone: each is read, or refused with its reason."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from r1fast.models import folders
from r1fast.models.families import ALIASES, FAMILIES, NO_EFFECT, fixed_values
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import check_checkpoint

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "num_hidden_layers": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
}  # fmt: skip
_DEEPSEEK = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
}  # fmt: skip
_LLAMA3_ROPE = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip

_MISTRAL = _COMMON | {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
_GEMMA2 = {name: value for name, value in _COMMON.items() if name not in ("hidden_act", "tie_word_embeddings")} | {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000,
}  # fmt: skip
_GEMMA3 = {name: value for name, value in _COMMON.items() if name not in ("hidden_act", "tie_word_embeddings")} | {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144,
}  # fmt: skip
_PHI4_MINI = _COMMON | {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_size": 3072,
    "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24, "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "long_factor": [1, 1.118320672, *[2.5] * 46], "short_factor": [1.0] * 48, "type": "longrope",
    },
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
_SMOLLM3 = _COMMON | {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "bos_token_id": None, "eos_token_id": 128012,
    "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 0], "num_attention_heads": 16, "num_key_value_heads": 4,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
_OLMO2 = _COMMON | {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
    "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 500000, "vocab_size": 100352,
}  # fmt: skip
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8,
    "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
}  # fmt: skip
_QWEN2_MOE = _COMMON | {
    "architectures": ["Qwen2MoeForCausalLM"], "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643,
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16, "output_router_logits": False,
    "qkv_bias": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_OLMOE = _COMMON | {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "eos_token_id": 50279,
    "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "vocab_size": 50304,
}  # fmt: skip
_DEEPSEEK_V2 = {name: value for name, value in _DEEPSEEK.items() if name != "num_nextn_predict_layers"} | {
    "architectures": ["DeepseekV2ForCausalLM"], "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 2048,
    "intermediate_size": 10944, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "rope_scaling": _DEEPSEEK["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
}  # fmt: skip

READ: dict[str, dict[str, Any]] = {
    "deepseek-v3-as-published": _DEEPSEEK
    | {
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }
    },
    "deepseek-v3-bf16": _DEEPSEEK,
    "moonlight": _DEEPSEEK | {
        "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_scaling": None, "rope_theta": 50000.0,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "num_nextn_predict_layers": 0, "n_shared_experts": 2,
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048, "routed_scaling_factor": 2.446,
    },
    "qwen2.5-1.5b": _QWEN2,
    "qwen2.5-math-instruct": _QWEN2 | {"eos_token_id": 151645, "max_position_embeddings": 4096, "sliding_window": None},
    "r1-distill-qwen": _QWEN2 | {"tie_word_embeddings": False, "sliding_window": 4096, "vocab_size": 152064},
    "qwen2.5-yarn": _QWEN2 | {
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    },
    "qwen3-0.6b": _QWEN3,
    "qwen3-by-transformers-5": {
        **{name: value for name, value in _QWEN3.items() if not name.startswith("rope_") and name != "torch_dtype"},
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    },
    "qwen3-30b-a3b": _QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "llama-3.2-1b": _LLAMA | {"head_dim": 64, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "r1-distill-llama": _LLAMA | {
        "eos_token_id": [128001, 128008, 128009], "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0},
        "head_dim": 64, "_name_or_path": "x", "unsloth_fixed": True,
    },
    "llama-2-7b": _LLAMA | {
        "_name_or_path": "x", "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "rope_scaling": None,
        "num_key_value_heads": 32, "vocab_size": 32000, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6,
    },
    "smollm2-1.7b": _LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "is_llama_config": True, "pad_token_id": 2, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 130000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"dtype": "q4"},
    },
    "deepseek-coder-6.7b": _LLAMA | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "vocab_size": 32256},
    "mistral-7b-as-llama": _LLAMA | {"intermediate_size": 14336, "vocab_size": 32000, "bos_token_id": 1},
    "deepseek-v2-lite": _DEEPSEEK_V2,
    "mistral-7b-v0.1": _MISTRAL,
    "mistral-7b-v0.3": _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "mistral-nemo": _MISTRAL | {"head_dim": 128, "hidden_size": 5120, "sliding_window": None},
    "gemma-2-9b-without-the-last-cap": _GEMMA2,
    "gemma-3-1b-it": _GEMMA3,
    "phi-4-mini": _PHI4_MINI,
    "phi-4": _PHI4_MINI | {
        "rope_scaling": None, "sliding_window": None, "partial_rotary_factor": 1.0, "tie_word_embeddings": False,
        "original_max_position_embeddings": 16384, "max_position_embeddings": 16384, "rope_theta": 250000,
        "num_attention_heads": 40, "num_key_value_heads": 10, "hidden_size": 5120, "intermediate_size": 17920,
    },
    "phi-3-mini-128k": _PHI4_MINI | {
        "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 1.0, "rope_theta": 10000.0,
        "rope_scaling": {"long_factor": [1.05] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
    },
    "smollm3-3b": _SMOLLM3,
    "olmo-2-1b": _OLMO2,
    "mixtral-8x7b": _MIXTRAL,
    "qwen1.5-moe-a2.7b": _QWEN2_MOE,
    "olmoe-1b-7b": _OLMOE,
    "llama-longrope": _LLAMA | {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    },
    "reward-model": _LLAMA | {
        "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    },
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8-without-blocks": (
        _LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        "quantization_config .fp8. cannot be read, only fp8 with weight_block_size is dequantized",
    ),
    "awq": (
        _LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        "quantization_config .awq. cannot be read, .*; convert the checkpoint to bf16",
    ),
    "qwen2.5-1m": (
        _QWEN2 | {"dual_chunk_attention_config": {"chunk_size": 262144}},
        "dual_chunk_attention_config=.*not known for qwen2, so it may change what the model computes",
    ),
    "qwen2-window": (
        _QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4096},
        "sliding_window=4096, expected full attention",
    ),
    "mistral-as-llama-window": (_LLAMA | {"sliding_window": 4096}, "sliding_window=4096, expected full attention"),
    "deepseek-v2-router": (_DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func='softmax', expected sigmoid"),
    "deepseek-v2-topk": (_DEEPSEEK | {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
    "moe-every-second-layer": (_DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq=2, expected 1"),
    "rotary-of-another-width": (_DEEPSEEK | {"head_dim": 128}, "head_dim=128, expected qk_rope_head_dim=64"),
    "minicpm-scales": (_LLAMA | {"scale_emb": 12, "scale_depth": 1.4}, "scale_emb=12 is not known for llama"),
    "granite-scale": (_LLAMA | {"logit_scale": 8.0}, "logit_scale=8.0 is not known for llama"),
    "gemma-softcap": (_LLAMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not known"),
    "olmo-clip": (_LLAMA | {"clip_qkv": 8.0}, "clip_qkv=8.0 is not known for llama"),
    "gelu": (_QWEN3 | {"hidden_act": "gelu"}, "hidden_act='gelu', expected silu"),
    "mlp-bias": (_QWEN3 | {"mlp_bias": True}, "mlp_bias=True, expected false"),
    "windowed-layers": (
        _QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=.*, expected full_attention in each of the 2 layers",
    ),
    "partial-rotary": (_LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, expected 1.0"),
    "dynamic-rope": (_LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic', expected"),
    "longrope-of-another-width": (
        _LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 31, "long_factor": [2.0] * 32}},
        "short_factor=.*, expected 32 numbers, one of each pair",
    ),
    "deepseek-v2-groups": (
        _DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, "expected"
    ),
    "gemma-3-softcap": (_GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0, expected null"),
    "gemma-2-9b": (_GEMMA2 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, expected null: losses"),
    "gemma-2-no-cap": (_GEMMA2 | {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0, expected a number ab"),
    "gemma-both-ways": (_GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True, expected"),
    "gemma-gelu": (_GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation='gelu', expected gelu_pytorch_tanh"),
    "olmoe-clip": (_OLMOE | {"clip_qkv": 8.0}, "clip_qkv=8.0, expected null"),
    "smollm3-window": (
        _SMOLLM3 | {"use_sliding_window": True, "sliding_window": 512, "layer_types": None},
        "sliding_window=512, expected full attention",
    ),
    "qwen2-moe-window": (_QWEN2_MOE | {"use_sliding_window": True}, "sliding_window=32768, expected full attention"),
    "qwen2-moe-no-bias": (_QWEN2_MOE | {"qkv_bias": False}, "qkv_bias=False, expected true"),
    "mrope": (_QWEN2 | {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    "interleaved-llama": (_LLAMA | {"rope_interleaved": True}, "rope_interleaved=True, expected false"),
    "not-causal": (_LLAMA | {"is_causal": False}, "is_causal=False, expected true"),
    "layers-apart": (_LLAMA | {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config=.* is not known"),
    "mlx-quantized": (_LLAMA | {"quantization": {"bits": 4, "group_size": 64}}, "quantization=.* is not known"),
}  # fmt: skip


def config_of(values: dict[str, Any], folder: Path) -> tuple[ModelConfig, bool]:
    (folder / "config.json").write_text(json.dumps(values))
    described = folders.read_config(folder)
    return described.config, described.is_reward_model


@pytest.mark.parametrize("name", READ)
def test_read(name: str, tmp_path: Path) -> None:
    values = READ[name]
    config, is_reward_model = config_of(values, tmp_path)
    assert is_reward_model == (name == "reward-model")
    for key in FAMILIES[values["model_type"]].fields:
        if key in values and key != "rope_parameters":
            found = getattr(config, key)
            assert (list(found) if isinstance(found, tuple) else found) == values[key], key
    rope = next(iter(config.ropes.values()))
    assert rope["rope_theta"] == values.get("rope_theta", 1000000)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: .*{message}") as raised:
        config_of(values, tmp_path)
    assert "\n" not in str(raised.value)


def test_hub_ids_are_checked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REFUSED["olmo-clip"][0]))
    monkeypatch.setattr(folders, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(ValueError, match=r"clip_qkv=8.0 is not known"):
        check_checkpoint("owner/model")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_reads_is_accounted_for(family: str) -> None:
    """No field that its modeling code, masks or rotary embeddings read is said to have no effect, but for these."""
    name = family.removesuffix("_text")
    modules = [f"models.{name}.modeling_{name}", "modeling_rope_utils", "masking_utils"]
    source = "\n".join(inspect.getsource(import_module(f"transformers.{module}")) for module in modules)
    read = set(re.findall(r"\bconfig\.([a-z]\w*)", source)) | set(re.findall(r"getattr\(config, \"(\w+)\"", source))
    assert {"hidden_size", "rms_norm_eps", "head_dim", "sliding_window"} <= read
    row, values = FAMILIES[family], AutoConfig.for_model(family).to_dict()
    ignored = NO_EFFECT.union(row.no_effect).difference(row.fields)
    assert read & ignored <= {
        "attention_dropout", "embd_pdrop", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise",  # of training
        "output_router_logits", "use_cache", "model_type",
        "use_sliding_window",  # false: asked for by sliding_window
    }  # fmt: skip
    # What it reads of the rest, we read too, or ask for one value of it; check_keys refuses any other name.
    assert values.keys() & read - ignored <= {*row.fields, *fixed_values(values), *ALIASES}
