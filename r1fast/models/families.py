"""The families of models, a row each: what its config.json may say, and the parts that its decoder is built of.

A key of a config.json is a field of ModelConfig, or has no effect on the forward pass, or has to have the value that
the decoder computes (`fixed`), or is refused: a key that nobody knows may stand for anything. `null` means "not there".
What transformers' modeling code of each family reads is a field or fixed: a test looks it up there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
_LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}

# The norms of a layer by their names on disk: before attention, after it, before the MLP, after it.
NormNames = tuple[str | None, str | None, str | None, str | None]
PRE_NORMS: NormNames = ("input_layernorm", None, "post_attention_layernorm", None)
POST_NORMS: NormNames = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
BOTH_NORMS: NormNames = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip

ONE_ROPE = "default"
FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types


@dataclass(frozen=True)
class Layer:
    """What may differ between the layers of a model."""

    is_moe: bool = False
    rope: str | None = ONE_ROPE  # which of the model's rotary embeddings; None: no rotation
    window: int | None = None  # tokens that a query sees; None: all before it


@dataclass(frozen=True)
class Family:
    fields: tuple[str, ...]  # of ModelConfig; any other would be given and not used
    attention: Literal["grouped", "latent"] = "grouped"
    layer: Callable[["ModelConfig", int], Layer] = lambda config, layer_idx: Layer()
    norms: NormNames = PRE_NORMS
    norm_offset: float = 0.0  # on the weight of every norm
    qk_norm: Literal["head", "projection"] | None = None  # over a head's channels, or over all heads' at once
    qkv_bias: bool = False  # always on, that of o is not
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scales_embedding: bool = False  # times sqrt(hidden_size)
    ropes: tuple[str, ...] = ()  # keys of rope_parameters, which Layer.rope names; none: it is one rotary embedding
    partial_rotary: bool = False  # rope_parameters may say that only the first channels of a head are rotated
    router: Literal["sigmoid", "softmax"] = "softmax"  # sigmoid: with groups and a bias, as of DeepSeek-V3
    norm_topk_prob: bool | None = None  # None: a field
    expert_width: str = "moe_intermediate_size"
    needs_experts: bool = False
    shared_gate: bool = False  # a sigmoid of its own, for each token, on what the shared expert adds
    has_mtp_layers: bool = False  # multi-token prediction: weights past the last layer, which are left out
    heads_divide_width: bool = False  # transformers refuses others, whatever head_dim says
    renamed: Mapping[str, str] = field(default_factory=dict)  # parts of a tensor's name, ours -> on disk
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a projection on disk: those of ours inside
    hf_names: Mapping[str, str] = field(default_factory=dict)  # a field's name in config.json, where it is another
    written: Callable[["ModelConfig"], Mapping[str, Any]] = lambda config: {}  # into config.json, beside the fields
    no_effect: tuple[str, ...] = ()
    fixed: Fixed = field(default_factory=dict)


def _windowed(config: "ModelConfig", layer_idx: int) -> Layer:
    return Layer(window=config.sliding_window)


def _all_sparse(config: "ModelConfig", layer_idx: int) -> Layer:
    return Layer(is_moe=True, window=config.sliding_window)


def _by_layer_type(config: "ModelConfig", layer_idx: int) -> Layer:
    kind = config.layer_types[layer_idx]
    return Layer(rope=kind, window=config.sliding_window if kind == SLIDING else None)


def _by_layer_type_with_one_rope(config: "ModelConfig", layer_idx: int) -> Layer:
    return replace(_by_layer_type(config, layer_idx), rope=ONE_ROPE)


def _original_length(config: "ModelConfig") -> dict[str, Any]:
    """transformers' Phi-3 takes it from here, and not from rope_parameters."""
    found = config.rope_parameters.get("original_max_position_embeddings")
    return {} if found is None else {"original_max_position_embeddings": found}


def _sparse_past_the_first(config: "ModelConfig", layer_idx: int) -> Layer:
    return Layer(is_moe=layer_idx >= config.first_k_dense_replace)


def _sparse_every_few(config: "ModelConfig", layer_idx: int) -> Layer:
    sparse = config.n_routed_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
    return Layer(is_moe=sparse and layer_idx not in config.mlp_only_layers)


_GEMMA: Fixed = {
    "hidden_activation": (("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
    "use_bidirectional_attention": ((False,), "false"),
    "final_logit_softcapping": ((), "null: losses and samplers go over the head's products in parts, without a cap"),
}

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        fields=(
            *_COMMON, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", *_LATENTS, "attention_bias",
            "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace",
        ),
        attention="latent",
        layer=_sparse_past_the_first,
        norm_topk_prob=False,
        heads_divide_width=True,
        written=lambda _: {"scoring_func": "softmax", "topk_method": "greedy"},
        fixed={
            "scoring_func": (("softmax",), "softmax"),
            "topk_method": (("greedy",), "greedy, which knows no groups of experts"),
            "n_group": ((1,), "1"),
            "topk_group": ((1,), "1"),
            "norm_topk_prob": ((False,), "false"),
            "moe_layer_freq": ((1,), "1: every layer past first_k_dense_replace is MoE"),
        },
    ),
    "deepseek_v3": Family(
        fields=(
            *_COMMON, *_EXPERTS, *_LATENTS, "attention_bias", "rope_interleave", "n_group", "topk_group",
            "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace",
        ),
        attention="latent",
        router="sigmoid",
        layer=_sparse_past_the_first,
        has_mtp_layers=True,
        # transformers has V3's router in its code; vLLM reads it here, and falls back on V2's softmax.
        written=lambda _: {"num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        fixed={
            "scoring_func": (("sigmoid",), "sigmoid"),
            "topk_method": (("noaux_tc",), "noaux_tc"),
            "moe_layer_freq": ((1,), "1: every layer past first_k_dense_replace is MoE"),
        },
    ),
    "gemma2": Family(
        fields=(
            *_COMMON, "head_dim", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types",
            "attn_logit_softcapping",
        ),
        layer=_by_layer_type_with_one_rope,
        norms=BOTH_NORMS,
        norm_offset=1.0,
        activation="gelu_tanh",
        scales_embedding=True,
        heads_divide_width=True,
        written=lambda _: {"final_logit_softcapping": None},
        # hidden_activation and sliding_window say it
        no_effect=("cache_implementation", "hidden_act", "sliding_window_size"),
        fixed=_GEMMA,
    ),
    "gemma3_text": Family(
        fields=(
            *_COMMON, "head_dim", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types",
        ),
        layer=_by_layer_type,
        norms=BOTH_NORMS,
        norm_offset=1.0,
        qk_norm="head",
        activation="gelu_tanh",
        scales_embedding=True,
        ropes=(FULL, SLIDING),
        heads_divide_width=True,
        no_effect=("sliding_window_pattern", "cache_implementation"),  # layer_types says it
        fixed={**_GEMMA, "attn_logit_softcapping": ((), "null")},
    ),
    "llama": Family(fields=(*_COMMON, "head_dim", "attention_bias", "mlp_bias"), heads_divide_width=True),
    "mistral": Family(fields=(*_COMMON, "head_dim", "sliding_window"), layer=_windowed),
    "mixtral": Family(
        fields=(*_COMMON, "n_routed_experts", "num_experts_per_tok", "head_dim", "sliding_window"),
        layer=_all_sparse,
        norm_topk_prob=True,
        expert_width="intermediate_size",
        needs_experts=True,
        renamed={
            ".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2.",
        },
        hf_names={"n_routed_experts": "num_local_experts"},
        no_effect=("router_jitter_noise",),  # of training
    ),
    "olmo2": Family(fields=(*_COMMON, "attention_bias"), norms=POST_NORMS, qk_norm="projection"),
    "olmoe": Family(
        fields=(*_COMMON, "n_routed_experts", "num_experts_per_tok", "norm_topk_prob", "attention_bias"),
        layer=_all_sparse,
        qk_norm="projection",
        expert_width="intermediate_size",
        needs_experts=True,
        hf_names={"n_routed_experts": "num_experts"},
        fixed={"clip_qkv": ((), "null")},
    ),
    "phi3": Family(
        fields=(*_COMMON, "sliding_window"),
        layer=_windowed,
        partial_rotary=True,
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        written=_original_length,
        no_effect=("embd_pdrop", "resid_pdrop"),
        fixed={"full_attn_mod": ((1,), "1"), "interpolate_factor": ((1,), "1"), "lm_head_bias": ((False,), "false")},
    ),
    "qwen2": Family(fields=(*_COMMON, "head_dim"), qkv_bias=True, no_effect=("attention_bias",)),
    "qwen2_moe": Family(
        fields=(*_COMMON, *_EXPERTS, "decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size"),
        layer=_sparse_every_few,
        qkv_bias=True,
        needs_experts=True,
        shared_gate=True,
        renamed={".shared_experts.": ".shared_expert."},
        hf_names={"n_routed_experts": "num_experts"},
        fixed={"qkv_bias": ((True,), "true")},
    ),
    "qwen3": Family(fields=(*_COMMON, "head_dim", "attention_bias"), qk_norm="head"),
    "qwen3_moe": Family(
        fields=(*_COMMON, *_EXPERTS, "head_dim", "attention_bias", "decoder_sparse_step", "mlp_only_layers"),
        layer=_sparse_every_few,
        qk_norm="head",
        needs_experts=True,
        hf_names={"n_routed_experts": "num_experts"},
    ),
    "smollm3": Family(
        fields=(*_COMMON, "attention_bias", "mlp_bias", "no_rope_layers"),
        layer=lambda config, layer_idx: Layer(rope=ONE_ROPE if config.no_rope_layers[layer_idx] else None),
        no_effect=("no_rope_layer_interval",),  # no_rope_layers says it
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
    # of the rewards that OpenRLHF saw, with which it shifts them where normalize_reward is true
    "mean", "std",
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
    full, rope = [FULL] * values["num_hidden_layers"], values.get("rope_parameters") or {}
    original, share = "original_max_position_embeddings", "partial_rotary_factor"
    fixed: Fixed = {
        "hidden_act": (("silu", "swish"), "silu"),
        "is_causal": ((True,), "true"),
        "is_encoder_decoder": ((False,), "false"),
        "add_cross_attention": ((False,), "false"),
        "pruned_heads": (({},), "none"),
        "attention_bias": ((False,), "false"),
        "mlp_bias": ((False,), "false"),
        "use_mrope": ((False,), "false"),
        "rope_interleaved": ((False,), "false"),
        "qk_layernorm": ((False,), "false"),
        "normalize_reward": ((False,), "false"),
        "value_head_prefix": (("score", "value_head"), "score or value_head"),
        "sliding_window": (window, "full attention (use_sliding_window: false)"),
        "layer_types": ((full,), f"full_attention in each of the {len(full)} layers"),
        original: ((rope.get(original, values.get(original)),), "what rope_parameters says"),
        share: ((rope.get(share),), "what rope_parameters says"),
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
