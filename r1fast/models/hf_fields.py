"""What a config.json may say beside the fields that ModelConfig reads.

Every other key either has no effect on the forward pass (NO_EFFECT), or has to have the value that the decoder computes
(FIXED), or is refused: a key that nobody knows may stand for anything. `null` means "not there". What transformers'
modeling code of each family reads is in one of these sets, or a field: a test looks it up there.
"""

from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig

_BOOKKEEPING = (
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path",
    "tokenizer_class", "unsloth_fixed", "unsloth_version", "trust_remote_code", "is_llama_config",
    "transformers.js_config", "keys_to_ignore_at_inference", "max_sequence_length", "model_max_length",
    "finetuning_task", "task_specific_params", "prefix", "problem_type", "id2label", "label2id", "num_labels",
)  # fmt: skip
_TOKEN_IDS = ("sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id")
# Dropout and auxiliary losses of transformers' own training; this trainer's are options of a stage.
_TRAINING = (
    "attention_dropout", "classifier_dropout", "router_aux_loss_coef", "output_router_logits", "aux_loss_alpha",
    "seq_aux",
)  # fmt: skip
# How the same numbers are computed or returned.
_EXECUTION = (
    "pretraining_tp", "ep_size", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "use_bfloat16", "chunk_size_feed_forward", "tie_encoder_decoder", "is_decoder", "tf_legacy_loss",
    "attn_implementation", "experts_implementation", "gradient_checkpointing", "tie_last_hidden_states",
)  # fmt: skip
# Multi-token-prediction layers stand past num_hidden_layers; their weights are left out.
_OTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
# They say where a window begins, and whether there is one: sliding_window is None then.
_WINDOW = ("use_sliding_window", "max_window_layers")

NO_EFFECT = frozenset(
    (*_BOOKKEEPING, *_TOKEN_IDS, *_TRAINING, *_EXECUTION, *_OTHER_LAYERS, *_WINDOW, *GenerationConfig().to_dict())
)
# Of one family: transformers' code of it does not read them.
FAMILY_NO_EFFECT = {"qwen2": frozenset({"attention_bias"})}  # its q, k, v biases are always on, that of o is not

# key: (values that say what the decoder does, how to name them in an error)
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "silu"),
    "is_causal": ((True,), "true"),
    "is_encoder_decoder": ((False,), "false"),
    "add_cross_attention": ((False,), "false"),
    "pruned_heads": (({},), "none"),
    "mlp_bias": ((False,), "false"),
    "use_mrope": ((False,), "false"),
    "rope_interleaved": ((False,), "false"),
    "qk_layernorm": ((False,), "false"),
}
FAMILY_FIXED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "deepseek_v3": {
        "scoring_func": (("sigmoid",), "sigmoid"),
        "topk_method": (("noaux_tc",), "noaux_tc"),
        "moe_layer_freq": ((1,), "1: every layer past first_k_dense_replace is MoE"),
    }
}


def check_fields(values: dict[str, Any], own: Collection[str]) -> None:
    """Raise ValueError for the first key of a config (transformers' to_dict) that the decoder would get wrong.

    own: the fields that ModelConfig has for this family.
    """
    model_type = values["model_type"]
    ignored = NO_EFFECT | FAMILY_NO_EFFECT.get(model_type, frozenset())
    fixed = FIXED | FAMILY_FIXED.get(model_type, {}) | _computed(values)
    for key, value in values.items():
        if value is None or key in own or key in ignored or key.startswith("_"):
            continue
        if key not in fixed:
            raise ValueError(
                f"model config: {key}={value!r:.80} is not known for {model_type}, so it may change what the model "
                "computes; if it does not, take it out of the file"
            )
        accepted, expected = fixed[key]
        if value not in accepted:
            raise ValueError(f"model config: {key}={value!r:.80}, expected {expected}")


def _computed(values: dict[str, Any]) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Keys whose one value depends on others."""
    window_is_on = values.get("use_sliding_window", True)
    full = ["full_attention"] * values["num_hidden_layers"]
    found = {
        "sliding_window": (
            () if window_is_on else (values.get("sliding_window"),),
            "full attention (use_sliding_window: false)",
        ),
        "layer_types": ((full,), f"full_attention in each of the {len(full)} layers"),
    }
    if values["model_type"] == "deepseek_v3":  # transformers repeats them; its rotary embedding reads the first
        rotary = values["qk_rope_head_dim"]
        found["head_dim"] = ((rotary,), f"qk_rope_head_dim={rotary}")
        whole = rotary + values["qk_nope_head_dim"]
        found["qk_head_dim"] = ((whole,), f"qk_nope_head_dim + qk_rope_head_dim={whole}")
    return found
