"""The families of models, a row each: what its config.json may say, and the parts that its decoder is built of.

A key of a config.json is a field of ModelConfig, or has no effect on the forward pass, or has to have the value that
the decoder computes (`fixed`), or is refused: a key that nobody knows may stand for anything. `null` means "not there".
What transformers' modeling code of each family reads is a field or fixed: a test looks it up there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transformers import GenerationConfig

if TYPE_CHECKING:
    from r1fast.models.model_config import ModelConfig

Fixed = dict[str, tuple[tuple[Any, ...], str]]  # key: (values that say what the decoder does, how an error names them)

_COMMON = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}


def _every_few(config: "ModelConfig", layer_idx: int) -> bool:
    sparse = config.n_routed_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
    return sparse and layer_idx not in config.mlp_only_layers


@dataclass(frozen=True)
class Family:
    fields: tuple[str, ...]  # of ModelConfig; any other would be given and not used
    attention: Literal["grouped", "latent"] = "grouped"
    router: Literal["sigmoid", "softmax"] = "softmax"  # sigmoid: with groups and a bias, as of DeepSeek-V3
    is_moe_layer: Callable[["ModelConfig", int], bool] = lambda config, layer_idx: False
    qkv_bias: bool = False  # always on, that of o is not
    qk_norm: bool = False
    has_mtp_layers: bool = False  # multi-token prediction: weights past the last layer, which are left out
    hf_names: Mapping[str, str] = field(default_factory=dict)  # a field's name in config.json, where it is another
    written: Mapping[str, Any] = field(default_factory=dict)  # into config.json, beside the fields
    no_effect: tuple[str, ...] = ()
    fixed: Fixed = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        fields=(
            *_COMMON, *_EXPERTS, "attention_bias", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "rope_interleave", "n_group", "topk_group", "n_shared_experts",
            "routed_scaling_factor", "first_k_dense_replace",
        ),
        attention="latent",
        router="sigmoid",
        is_moe_layer=lambda config, layer_idx: layer_idx >= config.first_k_dense_replace,
        has_mtp_layers=True,
        # transformers has V3's router in its code; vLLM reads it here, and falls back on V2's softmax.
        written={"num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        fixed={
            "scoring_func": (("sigmoid",), "sigmoid"),
            "topk_method": (("noaux_tc",), "noaux_tc"),
            "moe_layer_freq": ((1,), "1: every layer past first_k_dense_replace is MoE"),
        },
    ),
    "llama": Family(fields=(*_COMMON, "head_dim", "attention_bias", "mlp_bias")),
    "qwen2": Family(fields=(*_COMMON, "head_dim"), qkv_bias=True, no_effect=("attention_bias",)),
    "qwen3": Family(fields=(*_COMMON, "head_dim", "attention_bias"), qk_norm=True),
    "qwen3_moe": Family(
        fields=(*_COMMON, *_EXPERTS, "head_dim", "attention_bias", "decoder_sparse_step", "mlp_only_layers"),
        is_moe_layer=_every_few,
        qk_norm=True,
        hf_names={"n_routed_experts": "num_experts"},
    ),
}  # fmt: skip

NO_EFFECT = frozenset((
    # bookkeeping
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path",
    "tokenizer_class", "unsloth_fixed", "unsloth_version", "trust_remote_code", "is_llama_config",
    "transformers.js_config", "keys_to_ignore_at_inference", "max_sequence_length", "model_max_length",
    "finetuning_task", "task_specific_params", "prefix", "problem_type", "id2label", "label2id", "num_labels",
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    # dropout and auxiliary losses of transformers' own training; this trainer's are options of a stage
    "attention_dropout", "classifier_dropout", "router_aux_loss_coef", "output_router_logits", "aux_loss_alpha",
    "seq_aux",
    # how the same numbers are computed or returned
    "pretraining_tp", "ep_size", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "use_bfloat16", "chunk_size_feed_forward", "tie_encoder_decoder", "is_decoder", "tf_legacy_loss",
    "attn_implementation", "experts_implementation", "gradient_checkpointing", "tie_last_hidden_states",
    # layers past num_hidden_layers, whose weights are left out
    "num_nextn_predict_layers", "num_mtp_layers",
    # where a window begins, and whether there is one: sliding_window is None then
    "use_sliding_window", "max_window_layers",
    *GenerationConfig().to_dict(),
))  # fmt: skip


def fixed_values(values: Mapping[str, Any]) -> Fixed:
    """The keys that must have the value of the decoder, beside config.json's `values`."""
    family = FAMILIES[values["model_type"]]
    window = () if values.get("use_sliding_window", True) else (values.get("sliding_window"),)
    full = ["full_attention"] * values["num_hidden_layers"]
    fixed: Fixed = {
        "hidden_act": (("silu", "swish"), "silu"),
        "is_causal": ((True,), "true"),
        "is_encoder_decoder": ((False,), "false"),
        "add_cross_attention": ((False,), "false"),
        "pruned_heads": (({},), "none"),
        "mlp_bias": ((False,), "false"),
        "use_mrope": ((False,), "false"),
        "rope_interleaved": ((False,), "false"),
        "qk_layernorm": ((False,), "false"),
        "sliding_window": (window, "full attention (use_sliding_window: false)"),
        "layer_types": ((full,), f"full_attention in each of the {len(full)} layers"),
        **family.fixed,
    }
    if family.attention == "latent":  # transformers repeats two widths; its rotary embedding reads the first
        rotary, whole = values["qk_rope_head_dim"], values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        fixed["head_dim"] = ((rotary,), f"qk_rope_head_dim={rotary}")
        fixed["qk_head_dim"] = ((whole,), f"qk_nope_head_dim + qk_rope_head_dim={whole}")
    return fixed


def check_keys(values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first key of a config (transformers' to_dict) that the decoder would get wrong."""
    model_type = values["model_type"]
    family, fixed = FAMILIES[model_type], fixed_values(values)
    passed = NO_EFFECT.union(family.fields, family.no_effect)
    for key, value in values.items():
        if value is None or key in passed or key.startswith("_"):
            continue
        if key not in fixed:
            raise ValueError(
                f"model config: {key}={value!r:.80} is not known for {model_type}, so it may change what the model "
                "computes; if it does not, take it out of the file"
            )
        accepted, expected = fixed[key]
        if value not in accepted:
            raise ValueError(f"model config: {key}={value!r:.80}, expected {expected}")
