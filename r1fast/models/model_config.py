"""The architecture of a decoder in Hugging Face's field names, one dataclass for every family (families.py)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from r1fast.models import checks
from r1fast.models.checks import MAX_EXPERTS, MAX_LAYERS, Values, number, require, whole
from r1fast.models.families import ALIASES, FAMILIES, FULL, ONE_ROPE, SLIDING, Family, Layer, check_keys
from r1fast.wording import did_you_mean

_FLOATS = ("initializer_range", "rms_norm_eps", "routed_scaling_factor", "attn_logit_softcapping")
Size = Annotated[int, checks.SIZE]
SizeOrNone = Annotated[int | None, checks.SIZE.or_null()]
Count = Annotated[int, checks.COUNT]
Flag = Annotated[bool, checks.FLAG]
TokenOrNone = Annotated[int | None, checks.TOKEN]


@dataclass(frozen=True)
class ModelConfig:
    """Fields mean what they mean in transformers; `n_routed_experts` is also Qwen's `num_experts`."""

    model_type: str  # one of FAMILIES
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size  # width of the dense MLP
    num_hidden_layers: Annotated[int, whole(1, MAX_LAYERS, f"a whole number, 1 to {MAX_LAYERS}")]
    num_attention_heads: Size
    num_key_value_heads: SizeOrNone = None  # None: as many as query heads
    head_dim: SizeOrNone = None  # None: hidden_size // num_attention_heads; MLA has its own dims below
    max_position_embeddings: Size = 4096
    initializer_range: Annotated[float, number(0, 1e3, "a number, 0 or more")] = 0.02
    rms_norm_eps: Annotated[float, number(1e-30, 1, "a number above 0, at most 1")] = 1e-6
    tie_word_embeddings: Flag = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # rope_type, rope_theta, factor, ...; or several
    attention_bias: Flag = False  # Qwen2's q, k, v biases are always on
    mlp_bias: Flag = False  # Llama
    bos_token_id: TokenOrNone = None
    eos_token_id: Annotated[int | list[int] | None, checks.TOKENS] = None
    pad_token_id: TokenOrNone = None
    sliding_window: SizeOrNone = None  # tokens that a query sees, in the layers that have a window
    layer_types: tuple[str, ...] = ()  # of each layer: full_attention or sliding_attention; (): all full
    no_rope_layers: tuple[int, ...] = ()  # SmolLM3: of each layer, 1 where there is a rotation; (): in all
    query_pre_attn_scalar: SizeOrNone = None  # 1 over its root scales the scores; None: 1 over that of head_dim
    attn_logit_softcapping: Annotated[float | None, checks.CAP] = None  # that scaled scores stay within; None: no bound
    # MLA (DeepSeek)
    q_lora_rank: SizeOrNone = None  # None: one q_proj
    kv_lora_rank: Count = 0
    qk_nope_head_dim: Count = 0
    qk_rope_head_dim: Count = 0
    v_head_dim: Count = 0
    rope_interleave: Flag = True
    # mixture of experts
    n_routed_experts: Annotated[int, whole(0, MAX_EXPERTS, f"a whole number, 0 to {MAX_EXPERTS}")] = 0
    n_shared_experts: Count = 0
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    n_group: Annotated[int, checks.SIZE.or_null()] = 1
    topk_group: Annotated[int, checks.SIZE.or_null()] = 1
    norm_topk_prob: Flag = True
    routed_scaling_factor: Annotated[float, number(1e-6, 1e6, "a number above 0")] = 1.0
    first_k_dense_replace: Count = 0  # DeepSeek: the first k layers are dense
    decoder_sparse_step: Size = 1  # Qwen: every step-th layer is MoE
    mlp_only_layers: tuple[int, ...] = ()  # Qwen: these layers are dense
    shared_expert_intermediate_size: Count = 0  # Qwen2-MoE

    def __post_init__(self) -> None:
        _check_family(self.model_type)
        for name, values in _values_of_fields().items():
            values.check(name, getattr(self, name))
        width, heads = self.hidden_size, self.num_attention_heads
        divides = self.uses_mla or self.head_dim is not None or width % heads == 0
        require(divides, "num_attention_heads", heads, f"a divisor of hidden_size={width}, or head_dim")
        normal = {
            "rope_parameters": self._normal_ropes(),
            # transformers' DeepSeek default is 128 whatever the query heads; MLA has as many of both.
            "num_key_value_heads": heads if self.uses_mla else self.kv_heads,
            "head_dim": self.attention_head_dim,
            "n_group": self.n_group or 1,
            "topk_group": self.topk_group or 1,
            "mlp_only_layers": _layers(self.mlp_only_layers, self.num_hidden_layers - 1),
            "layer_types": self._of_each_layer("layer_types", (FULL, SLIDING), FULL),
            "no_rope_layers": self._of_each_layer("no_rope_layers", (0, 1), 1),
            # transformers takes no integer for them.
            **{n: float(value) for n in _FLOATS if (value := getattr(self, n)) is not None},
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        _check_parts(self)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def uses_mla(self) -> bool:
        return self.family.attention == "latent"

    def layer(self, layer_idx: int) -> Layer:
        return self.family.layer(self, layer_idx)

    @property
    def ropes(self) -> dict[str, dict[str, Any]]:
        """The parameters of each rotary embedding, by the names that layers know it by."""
        return self.rope_parameters if self.family.ropes else {ONE_ROPE: self.rope_parameters}

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Channels per head that the rotation touches."""
        if self.uses_mla:
            return self.qk_rope_head_dim
        return int(self.attention_head_dim * self.rope_parameters.get("partial_rotary_factor", 1))

    @property
    def expert_width(self) -> int:
        width: int = getattr(self, self.family.expert_width)
        return width

    @property
    def shared_width(self) -> int:
        """Of the MLP that every token of a MoE layer goes through; 0: none."""
        return self.moe_intermediate_size * self.n_shared_experts + self.shared_expert_intermediate_size

    @property
    def has_router(self) -> bool:
        return any(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def has_router_bias(self) -> bool:
        return self.family.router == "sigmoid"

    @property
    def routing(self) -> dict[str, Any]:
        """Options of route_topk."""
        names, fixed = ("n_group", "topk_group", "routed_scaling_factor"), self.family.norm_topk_prob
        norm = self.norm_topk_prob if fixed is None else fixed
        return {"top_k": self.num_experts_per_tok, "norm_topk_prob": norm, **{n: getattr(self, n) for n in names}}

    def is_moe_layer(self, layer_idx: int) -> bool:
        return self.layer(layer_idx).is_moe

    def _normal_ropes(self) -> dict[str, Any]:
        given, names, limit = self.rope_parameters, self.family.ropes, self.max_position_embeddings
        if not names:
            return checks.normal_rope(given, limit, partial=self.family.partial_rotary)
        require(isinstance(given, Mapping), "rope_parameters", given, f"a mapping of {', '.join(names)}")
        nested = any(name in given for name in names)  # else one for all
        for name in given if nested else ():
            require(name in names, f"rope_parameters.{name}", given[name], f"only {', '.join(names)}")
        return {name: checks.normal_rope((given.get(name) or {}) if nested else given, limit) for name in names}

    def _of_each_layer(self, name: str, accepted: tuple[Any, ...], otherwise: Any) -> tuple[Any, ...]:
        """The field, written out where the family has it."""
        given, count = getattr(self, name), self.num_hidden_layers
        expected = f"a list of {count} of {accepted[0]} and {accepted[1]}, one of each layer"
        require(given is None or isinstance(given, list | tuple), name, given, expected)
        if name not in self.family.fields or not given:
            return (otherwise,) * count if name in self.family.fields else ()
        require(len(given) >= count and all(value in accepted for value in given), name, given, expected)
        return tuple(given[:count])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """A recipe's `architecture`; an unknown key is an error that names the nearest known one.

        What transformers could not load again once it is saved is an error here, before any work.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        named = _one_name_each(values)
        _check_names(named, [*fields, *ALIASES, "rope_theta"])
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        if absent := [name for name in required if name not in named]:
            raise ValueError(f"model config: missing {', '.join(absent)}; give every one of {', '.join(required)}")
        config = cls(**named)
        _check_from_scratch(config, named)
        try:
            config.to_hf()
        except StrictDataclassError as error:
            text = f"transformers could not load such a {config.model_type} ({str(error).splitlines()[-1].strip()})"
            raise ValueError(f"model config: {text}") from error
        return config

    @classmethod
    def from_hf(cls, config: PretrainedConfig) -> "ModelConfig":
        """The same architecture from a transformers config; what the decoder cannot do is an error."""
        values = {ALIASES.get(name, name): value for name, value in config.to_dict().items()}
        _check_family(values["model_type"])
        check_keys(values)
        return cls(**{name: values[name] for name in FAMILIES[values["model_type"]].fields if name in values})

    def to_hf(self, dtype: torch.dtype | None = None, *, scalar_head: bool = False) -> PretrainedConfig:
        """The transformers config of this architecture, with the family's own fields only."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        named = {self.family.hf_names.get(name, name): values[name] for name in self.family.fields}
        named |= {**self.family.written(self), "dtype": dtype, **({"num_labels": 1} if scalar_head else {})}
        del named["model_type"]
        config = AutoConfig.for_model(self.model_type, **named)
        suffix = "ForSequenceClassification" if scalar_head else "ForCausalLM"
        config.architectures = [type(config).__name__.removesuffix("Config") + suffix]
        return config


@cache
def _values_of_fields() -> dict[str, Values]:
    hints = get_type_hints(ModelConfig, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _check_family(model_type: Any) -> None:
    require(model_type in tuple(FAMILIES), "model_type", model_type, f"one of {', '.join(FAMILIES)}")


def _layers(given: Any, last: int) -> tuple[int, ...]:
    expected = f"a list of layers, 0 to {last}"
    require(given is None or isinstance(given, list | tuple), "mlp_only_layers", given, expected)
    for layer in given or ():
        require(type(layer) is int and 0 <= layer <= last, "mlp_only_layers", layer, expected)
    return tuple(given or ())


def _check_parts(config: ModelConfig) -> None:
    """Heads, experts and groups that divide each other; `config` has its defaults filled in."""
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    if config.uses_mla:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(config, name)
            require(value > 0, name, value, f"a positive number for {config.model_type}")
    if config.family.heads_divide_width:
        width, expected = config.hidden_size, f"a multiple of num_attention_heads={heads} for {config.model_type}"
        require(width % heads == 0, "hidden_size", width, expected)
    pad = config.pad_token_id
    require(pad is None or pad < config.vocab_size, "pad_token_id", pad, f"below vocab_size={config.vocab_size}")
    require(config.rope_dim % 2 == 0, "rotary dimension", config.rope_dim, "an even number")
    for name in ("short_factor", "long_factor"):
        if factors := config.rope_parameters.get(name):
            half = config.rope_dim // 2
            require(len(factors) == half, f"rope_parameters.{name}", factors, f"{half} numbers, one of each pair")
    windowless = "layer_types" in config.family.fields and config.sliding_window is None  # transformers runs none so
    require(not windowless, "sliding_window", None, f"a whole number above 0, for layers of {SLIDING}")
    if not config.has_router:
        return
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    require(0 < chosen <= experts, "num_experts_per_tok", chosen, f"1 to n_routed_experts={experts}")
    names = (config.family.expert_width, *(["shared_expert_intermediate_size"] if config.family.shared_gate else []))
    for name in names:
        require(getattr(config, name) > 0, name, getattr(config, name), "> 0")
    groups, kept = config.n_group, config.topk_group
    require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts={experts}")
    if config.has_router_bias:  # a group is judged by its two best experts
        require(experts >= 2 * groups, "n_group", groups, "groups of at least 2 experts")
    require(kept <= groups, "topk_group", kept, f"1 to n_group={groups}")
    most = experts // groups * kept
    require(chosen <= most, "num_experts_per_tok", chosen, f"1 to {most}, the experts of topk_group={kept} groups")


def _check_from_scratch(config: ModelConfig, given: Mapping[str, Any]) -> None:
    """What only a model that is made from a recipe must be: each field that was given has an effect."""
    vocab_size, layers = config.vocab_size, config.num_hidden_layers
    spread = given.get("initializer_range", config.initializer_range)
    require(0 < spread <= 1, "initializer_range", spread, "a number above 0, at most 1")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for i in ids if isinstance(ids, list) else [ids]:
            require(i is None or 0 <= i < vocab_size, name, i, f"0 to {vocab_size - 1}, as vocab_size={vocab_size}")
    if config.uses_mla:
        kv_heads, heads = given.get("num_key_value_heads"), config.num_attention_heads
        expected = f"num_attention_heads={heads}: latent attention has as many; drop it"
        require(kv_heads is None or kv_heads == heads, "num_key_value_heads", kv_heads, expected)
    experts, expected = given.get("n_routed_experts"), f"a layer with experts among the {layers}"
    require(not experts or config.has_router, "n_routed_experts", experts, expected)
    if config.family.needs_experts:
        require(config.n_routed_experts > 0, "num_experts", config.n_routed_experts, "a whole number above 0")


def _one_name_each(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's architecture with every field under our name, and all of the rotary embedding in rope_parameters."""
    values, rope = dict(values), dict[str, Any]()
    for name in ("rope_scaling", "rope_parameters"):
        given = values.pop(name, None)
        require(given is None or isinstance(given, dict), name, given, "a mapping such as {rope_type: default}")
        require(not (rope and given), name, given, "rope_parameters alone, which rope_scaling is an older name of")
        rope |= given or {}
    if "rope_theta" in values:
        require("rope_theta" not in rope, "rope_theta", values["rope_theta"], "one rope_theta; rope_parameters has one")
        rope["rope_theta"] = values.pop("rope_theta")
    named: dict[str, Any] = {"rope_parameters": rope}
    for name, value in values.items():
        require(ALIASES.get(name, name) not in named, name, value, f"one of {name} and {ALIASES.get(name, name)}")
        named[ALIASES.get(name, name)] = value
    return named


def _check_names(named: dict[str, Any], known: list[str]) -> None:
    """One that is unknown, or not of its family, is an error."""
    family = FAMILIES.get(str(named.get("model_type")))  # none: that is said elsewhere
    for name in named:
        if name not in known:
            raise ValueError(f"model config: unknown key {name[:80]!r}{did_you_mean(name[:80], known)}")
        if family is not None and name not in family.fields:
            raise ValueError(f"model config: {name} does not apply to model_type {named['model_type']!r}; drop it")
