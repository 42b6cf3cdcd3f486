"""Tiny models of every family, by name: as fields of a config.json, as a seeded decoder, as a checkpoint folder.

Two layers and a width of 32, so that a test trains one in a second; what a test needs otherwise it changes by keyword.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r1fast.models.decoder import Decoder

TEXTS = [
    "What is 1 + 2 ? What is 3 * 4 ?",
    "<think> one and two make three </think> <answer> 3 </answer>",
    "red red red blue blue blue green green green yes yes yes no no no good good good bad bad bad",
    "the quick brown fox jumps over the lazy dog, and the lazy dog sleeps on",
]
_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    **_COMMON, **_EXPERTS, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "n_group": 1, "topk_group": 1},
    "gemma2": {
        **_COMMON, "num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **_COMMON, "num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
    },
    "llama": {**_COMMON, "num_key_value_heads": 1},
    "mistral": {**_COMMON, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 6},
    "mixtral": {**_COMMON, "num_key_value_heads": 1, "num_experts_per_tok": 2, "num_local_experts": 4},
    "olmo2": {**_COMMON, "num_key_value_heads": 1},
    "olmoe": {**_COMMON, "num_key_value_heads": 1, "num_experts_per_tok": 2, "num_experts": 4, "norm_topk_prob": False},
    "phi3": {
        **_COMMON, "num_key_value_heads": 1, "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen2": {**_COMMON, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2_moe": {
        **_COMMON, **_EXPERTS, "num_key_value_heads": 1, "num_experts": 4, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3": {**_COMMON, "num_key_value_heads": 1, "head_dim": 12},
    "qwen3_moe": {
        **_COMMON, **_EXPERTS, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "norm_topk_prob": True,
    },
    "smollm3": {**_COMMON, "num_key_value_heads": 1, "no_rope_layers": [0, 1], "tie_word_embeddings": True},
}  # fmt: skip


def fields(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **FAMILIES[family], **changes}


def decoder(family: str, *, seed: int = 0, **changes: Any) -> "Decoder":
    import torch

    from r1fast.models.decoder import Decoder
    from r1fast.models.model_config import ModelConfig

    made = Decoder(ModelConfig.from_dict(fields(family, **changes)))
    made.init_weights(torch.Generator().manual_seed(seed))
    return made


def write_oracle(folder: Path, *, seed: int = 0, **values: Any) -> Path:
    """A random model as transformers makes it, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if values["model_type"] == "gemma2":  # which else has one of 30
        values["final_logit_softcapping"] = None
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, *, seed: int = 0, with_tokenizer: bool = True, **values: Any) -> Path:
    """The same (qwen2 unless `values` say otherwise) with a byte-level tokenizer of 320 entries."""
    from r1fast.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXTS, 320)
    values = {**(values or fields("qwen2", initializer_range=0.1)), "vocab_size": -(-len(tokenizer) // 8) * 8}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    return write_oracle(folder, seed=seed, **values)
