"""The architecture of a decoder in Hugging Face's field names, one dataclass for every family.

What a config.json may say beside these fields is in hf_fields.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from r1fast.models.checks import (
    ALIASES,
    FIELDS,
    architecture_fields,
    check_from_scratch,
    check_parts,
    check_types,
    normal_rope,
    require,
)
from r1fast.models.hf_fields import check_fields

FAMILIES = tuple(FIELDS)


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
        require(self.model_type in FAMILIES, "model_type", self.model_type, f"one of {', '.join(FAMILIES)}")
        check_types(self)
        width, heads = self.hidden_size, self.num_attention_heads
        divides = self.uses_mla or self.head_dim is not None or width % heads == 0
        require(divides, "num_attention_heads", heads, f"a divisor of hidden_size={width}, or head_dim")
        normal = {
            "rope_parameters": normal_rope(self.rope_parameters, self.max_position_embeddings),
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
        """A recipe's `architecture`; an unknown key is an error that names the nearest known one.

        What transformers could not load again once it is saved is an error here, before any work.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = architecture_fields(values, fields)
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if absent := [name for name in required if name not in values]:
            raise ValueError(f"model config: missing {', '.join(absent)}; give every one of {', '.join(required)}")
        config = cls(**values)
        check_from_scratch(config, values)
        try:
            config.to_hf()
        except StrictDataclassError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"model config: transformers could not load such a {config.model_type} ({reason})"
            ) from error
        return config

    @classmethod
    def from_hf(cls, config: PretrainedConfig) -> "ModelConfig":
        """The same architecture from a transformers config; what the decoder cannot do is an error."""
        values = config.to_dict()
        model_type = values["model_type"]
        require(model_type in FAMILIES, "model_type", model_type, f"one of {', '.join(FAMILIES)}")
        values = {ALIASES.get(name, name): value for name, value in values.items()}
        own = FIELDS[model_type]
        check_fields(values, own)
        return cls(**{name: values[name] for name in own if name in values})

    def to_hf(self, **overrides: Any) -> PretrainedConfig:
        """The transformers config of this architecture, with the family's own fields only."""
        values = {name: getattr(self, name) for name in FIELDS[self.model_type] if name != "model_type"}
        values["rope_parameters"] = dict(self.rope_parameters)
        if self.uses_mla:
            overrides["num_nextn_predict_layers"] = 0  # the multi-token-prediction block is not part of the decoder
            # transformers has V3's router in its code; vLLM reads it here, and falls back on V2's softmax.
            overrides |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        elif self.model_type == "qwen3_moe":
            values["num_experts"] = values.pop("n_routed_experts")
            values["mlp_only_layers"] = list(self.mlp_only_layers)
        return AutoConfig.for_model(self.model_type, **{**values, **overrides})
