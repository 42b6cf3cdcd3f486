"""The architecture of a decoder in Hugging Face's field names, one dataclass for every family.

What a config.json may say beside these fields is in hf_fields.py.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from r1fast.models.hf_fields import check_fields

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
_MOE = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
FAMILY_FIELDS = {
    "deepseek_v3": (*_COMMON, "attention_bias", *_MLA, *_MOE),
    "llama": (*_COMMON, "attention_bias", "head_dim", "mlp_bias"),
    "qwen2": (*_COMMON, "head_dim"),
    "qwen3": (*_COMMON, "attention_bias", "head_dim"),
    "qwen3_moe": (*_COMMON, "attention_bias", "head_dim", *_MOE, "decoder_sparse_step", "mlp_only_layers"),
}
FAMILIES = tuple(FAMILY_FIELDS)

# By rope_type: the numbers that it needs, and those that it takes beside rope_theta.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
}
ROPE_TYPES = tuple(_ROPE_KEYS)


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
        normal = {
            "rope_parameters": _normal_rope(self.rope_parameters, self.max_position_embeddings),
            # transformers' DeepSeek default is 128 whatever the query heads; MLA has as many of both.
            "num_key_value_heads": self.num_attention_heads if self.uses_mla else self.kv_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "n_group": self.n_group or 1,
            "topk_group": self.topk_group or 1,
            "mlp_only_layers": tuple(self.mlp_only_layers or ()),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check_dims()

    def _check_dims(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        if self.uses_mla:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number for deepseek_v3")
        elif self.model_type == "llama":  # transformers refuses it, whatever head_dim says
            width = self.hidden_size
            _require(width % heads == 0, "hidden_size", width, f"a multiple of num_attention_heads={heads} for llama")
        _require(self.rope_dim % 2 == 0, "rotary dimension", self.rope_dim, "an even number")
        pad = self.pad_token_id
        _require(pad is None or pad < self.vocab_size, "pad_token_id", pad, f"below vocab_size={self.vocab_size}")
        for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number, at least 0")
        own = FAMILY_FIELDS[self.model_type]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            _require(name in own or value == default, name, value, f"nothing: {self.model_type} has no such field")
        if any(self.is_moe_layer(i) for i in range(self.num_hidden_layers)):
            experts, chosen = self.n_routed_experts, self.num_experts_per_tok
            _require(0 < chosen <= experts, "num_experts_per_tok", chosen, f"1 to n_routed_experts={experts}")
            _require(self.moe_intermediate_size > 0, "moe_intermediate_size", self.moe_intermediate_size, "> 0")
            _require(experts % self.n_group == 0, "n_group", self.n_group, f"a divisor of n_routed_experts={experts}")
            if self.uses_mla:  # a group is judged by its two best experts
                _require(experts >= 2 * self.n_group, "n_group", self.n_group, "groups of at least 2 experts")
            _require(
                1 <= self.topk_group <= self.n_group, "topk_group", self.topk_group, f"1 to n_group={self.n_group}"
            )
            allowed = experts // self.n_group * self.topk_group
            _require(
                chosen <= allowed, "num_experts_per_tok", chosen, f"at most {allowed}, in the groups that are taken"
            )

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
        values = dict(values)
        rope = {**(values.pop("rope_scaling", None) or {}), **(values.pop("rope_parameters", None) or {})}
        if "rope_theta" in values:
            rope["rope_theta"] = values.pop("rope_theta")
        values = {_ALIASES.get(name, name): value for name, value in values.items()}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                nearest = difflib.get_close_matches(name, [*fields, *_ALIASES, "rope_theta"], n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"model config: unknown key {name!r}{hint}")
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if absent := [name for name in required if name not in values]:
            raise ValueError(f"model config: missing {', '.join(absent)}; give every one of {', '.join(required)}")
        config = cls(**values, rope_parameters=rope)
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
        _require(model_type in FAMILIES, "model_type", model_type, f"one of {', '.join(FAMILIES)}")
        values = {_ALIASES.get(name, name): value for name, value in values.items()}
        own = FAMILY_FIELDS[model_type]
        check_fields(values, own)
        return cls(model_type, **{name: values[name] for name in own if name in values})

    def to_hf(self, **overrides: Any) -> PretrainedConfig:
        """The transformers config of this architecture, with the family's own fields only."""
        values = {name: getattr(self, name) for name in FAMILY_FIELDS[self.model_type]}
        values["rope_parameters"] = dict(self.rope_parameters)
        if self.uses_mla:
            overrides["num_nextn_predict_layers"] = 0  # the multi-token-prediction block is not part of the decoder
            # transformers has V3's router in its code; vLLM reads it here, and falls back on V2's softmax.
            overrides |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        elif self.model_type == "qwen3_moe":
            values["num_experts"] = values.pop("n_routed_experts")
            values["mlp_only_layers"] = list(self.mlp_only_layers)
        return AutoConfig.for_model(self.model_type, **{**values, **overrides})


def _normal_rope(given: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """rope_parameters with a rope_type and a rope_theta; a key that its type does not know is an error."""
    rope = {"rope_type": given.get("type", "default"), "rope_theta": 10000.0, **given}
    rope.pop("type", None)
    rope.pop("finetuned", None)  # says where the weights came from
    rope_type, partial = rope["rope_type"], rope.pop("partial_rotary_factor", 1.0)
    _require(rope_type in ROPE_TYPES, "rope_type", rope_type, f"one of {', '.join(ROPE_TYPES)}")
    _require(partial == 1.0, "partial_rotary_factor", partial, "1.0")
    needed, optional = _ROPE_KEYS[rope_type]
    if "original_max_position_embeddings" in needed:
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
    for name, value in rope.items():
        known = name in ("rope_type", "rope_theta", *needed, *optional)
        _require(
            known or value is None, f"rope_parameters.{name}", value, f"nothing: rope_type {rope_type} has no such key"
        )
    for name in ("rope_theta", *needed):
        value = rope.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        _require(is_number, f"rope_parameters.{name}", value, f"a number above 0 for {rope_type}")
    for name in optional:
        value = rope.get(name)
        _require(value is None or isinstance(value, int | float), f"rope_parameters.{name}", value, "a number")
    return rope


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"model config: {name}={got!r}, expected {expected}")


# Of the fields that only some families have.
_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name not in (*_COMMON, "model_type", "head_dim")
}
