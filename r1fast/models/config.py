"""The architecture of a decoder in Hugging Face's field names, one dataclass for every family."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from r1fast.models.checks import architecture_fields, check_from_scratch, check_parts, check_rope, check_types
from r1fast.models.checks import require as _require

FAMILIES = ("deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe")

_ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_MLA = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "n_group", "topk_group", "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace",
)  # fmt: skip
_MOE = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


@dataclass(frozen=True)
class ModelConfig:
    """Fields mean what they mean in transformers; `n_routed_experts` is also Qwen's `num_experts`."""

    model_type: str  # one of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the dense MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size // num_attention_heads; MLA has its own dims below
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # rope_type, rope_theta, factor, ...
    attention_bias: bool = False  # Qwen2's q, k, v biases are always on
    mlp_bias: bool = False  # Llama
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # MLA (deepseek_v3)
    q_lora_rank: int | None = None  # None: one q_proj
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = True
    # mixture of experts (deepseek_v3, qwen3_moe)
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0  # DeepSeek: the first k layers are dense
    decoder_sparse_step: int = 1  # Qwen3-MoE: every step-th layer is MoE
    mlp_only_layers: tuple[int, ...] = ()  # Qwen3-MoE: these layers are dense

    def __post_init__(self) -> None:
        _require(self.model_type in FAMILIES, "model_type", self.model_type, f"one of {', '.join(FAMILIES)}")
        check_types(self)
        rope = {"rope_type": self.rope_parameters.get("type", "default"), "rope_theta": 10000.0, **self.rope_parameters}
        rope.pop("type", None)
        check_rope(rope)
        width, heads = self.hidden_size, self.num_attention_heads
        divides = self.uses_mla or self.head_dim is not None or width % heads == 0
        _require(divides, "num_attention_heads", heads, f"a divisor of hidden_size={width}, or head_dim")
        if rope["rope_type"] in ("llama3", "yarn"):
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        normal = {
            "rope_parameters": rope,
            # transformers' DeepSeek default is 128 whatever the query heads; MLA has as many of both.
            "num_key_value_heads": self.num_attention_heads if self.uses_mla else self.kv_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "n_group": self.n_group or 1,
            "topk_group": self.topk_group or 1,
            "mlp_only_layers": tuple(self.mlp_only_layers or ()),
            # transformers takes no integer for them.
            **{n: float(getattr(self, n)) for n in ("initializer_range", "rms_norm_eps", "routed_scaling_factor")},
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        check_parts(self)

    @property
    def uses_mla(self) -> bool:
        return self.model_type == "deepseek_v3"

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Channels per head that the rotation touches."""
        return self.qk_rope_head_dim if self.uses_mla else self.attention_head_dim

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")

    def is_moe_layer(self, layer_idx: int) -> bool:
        if self.model_type == "deepseek_v3":
            return layer_idx >= self.first_k_dense_replace
        if self.model_type == "qwen3_moe":
            sparse = self.n_routed_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0
            return sparse and layer_idx not in self.mlp_only_layers
        return False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """A recipe's `model` section; an unknown key is an error that names the nearest known one."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = architecture_fields(values, fields)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if absent := [name for name in required if name not in values]:
            raise ValueError(f"model config: missing {', '.join(absent)}; give every one of {', '.join(required)}")
        config = cls(**values)
        check_from_scratch(config, values)
        return config

    @classmethod
    def from_hf(cls, config: PretrainedConfig) -> "ModelConfig":
        """The same architecture from a transformers config; what the decoder cannot do is an error."""
        values = config.to_dict()
        model_type = values["model_type"]
        _require(model_type in FAMILIES, "model_type", model_type, f"one of {', '.join(FAMILIES)}")
        _require(values.get("hidden_act", "silu") == "silu", "hidden_act", values.get("hidden_act"), "silu")
        if values.get("sliding_window") is not None and model_type.startswith("qwen"):
            _require(False, "sliding_window", values["sliding_window"], "full attention (use_sliding_window: false)")
        rope = values.get("rope_parameters") or {}
        _require(rope.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor",
                 rope.get("partial_rotary_factor"), "1.0")  # fmt: skip
        if model_type == "deepseek_v3":
            values["head_dim"] = None  # transformers repeats qk_rope_head_dim there
        values = {_ALIASES.get(name, name): value for name, value in values.items()}
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_hf(self, **overrides: Any) -> PretrainedConfig:
        """The transformers config of this architecture, with the family's own fields only."""
        names = list(_COMMON)
        if self.model_type != "qwen2":
            names.append("attention_bias")
        if self.uses_mla:
            names += [*_MLA, *_MOE, "n_routed_experts"]
            overrides["num_nextn_predict_layers"] = 0  # the multi-token-prediction block is not part of the decoder
            # transformers has V3's router in its code; vLLM reads it here, and falls back on V2's softmax.
            overrides |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        elif self.model_type == "llama":
            names += ["head_dim", "mlp_bias"]
        elif self.model_type in ("qwen3", "qwen3_moe"):
            names.append("head_dim")
        values = {name: getattr(self, name) for name in names} | {"rope_parameters": dict(self.rope_parameters)}
        if self.model_type == "qwen3_moe":
            values |= {name: getattr(self, name) for name in (*_MOE, "decoder_sparse_step")}
            values |= {"num_experts": self.n_routed_experts, "mlp_only_layers": list(self.mlp_only_layers)}
        return AutoConfig.for_model(self.model_type, **{**values, **overrides})
