"""What an architecture must be before anything is built of it: types, sizes, and parts that fit each other.

Every error is a ValueError that names the field in Hugging Face's word, what was got, and what was expected.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_COMMON = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
# The fields that a family reads; any other would be given and not used.
FIELDS: dict[str, tuple[str, ...]] = {
    "deepseek_v3": (
        *_COMMON, *_EXPERTS, "attention_bias", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim", "rope_interleave", "n_group", "topk_group", "n_shared_experts", "routed_scaling_factor",
        "first_k_dense_replace",
    ),
    "llama": (*_COMMON, "head_dim", "attention_bias", "mlp_bias"),
    "qwen2": (*_COMMON, "head_dim"),
    "qwen3": (*_COMMON, "head_dim", "attention_bias"),
    "qwen3_moe": (*_COMMON, *_EXPERTS, "head_dim", "attention_bias", "decoder_sparse_step", "mlp_only_layers"),
}  # fmt: skip
ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # rope_type -> (required, optional)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}  # fmt: skip

MAX_SIZE = 2**31 - 1  # ops count in int32
MAX_LAYERS, MAX_EXPERTS = 10_000, 2**15 - 1  # rollouts keep the experts of a token as int16
_POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
_COUNTS = (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size", "first_k_dense_replace",
)  # fmt: skip
_POSITIVE_OR_NONE = ("num_key_value_heads", "head_dim", "q_lora_rank", "n_group", "topk_group")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_interleave", "norm_topk_prob")


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        text = repr(got)
        raise ValueError(f"model config: {name}={text if len(text) <= 60 else text[:57] + '...'}, expected {expected}")


def architecture_fields(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """A recipe's architecture with every field under one name; one that is unknown, or not of its family, is an error.

    known: the fields of any family.
    """
    values = dict(values)
    rope: dict[str, Any] = {}
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
        field = ALIASES.get(name, name)
        require(field not in named, name, value, f"one of {name} and {field}")
        named[field] = value
    _check_names(named, [*known, *ALIASES, "rope_theta"])
    return named


def _check_names(named: dict[str, Any], known: list[str]) -> None:
    for name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name[:80], known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"model config: unknown key {name[:80]!r}{hint}")
    family = named.get("model_type")
    if not isinstance(family, str) or family not in FIELDS:
        return  # missing or wrong, which is said elsewhere
    for name in named:
        if name not in FIELDS[family]:
            raise ValueError(f"model config: {name} does not apply to model_type {family!r}; drop it")


def check_types(config: Any) -> None:
    """Each field alone, before anything is computed from it."""
    for name in _POSITIVE:
        _check(_is_int(1, MAX_SIZE), config, name, "a whole number above 0")
    _check(_is_int(1, MAX_LAYERS), config, "num_hidden_layers", f"a whole number, 1 to {MAX_LAYERS}")
    _check(_is_int(0, MAX_EXPERTS), config, "n_routed_experts", f"a whole number, 0 to {MAX_EXPERTS}")
    _check(_is_int(1, MAX_SIZE), config, "decoder_sparse_step", "a whole number above 0")
    for name in _COUNTS:
        _check(_is_int(0, MAX_SIZE), config, name, "a whole number, 0 or more")
    for name in _POSITIVE_OR_NONE:
        if getattr(config, name) is not None:
            _check(_is_int(1, MAX_SIZE), config, name, "a whole number above 0, or null")
    for name in _FLAGS:
        _check(lambda value: isinstance(value, bool), config, name, "true or false")
    _check(_is_number(0, 1e3), config, "initializer_range", "a number, 0 or more")
    _check(_is_number(1e-30, 1), config, "rms_norm_eps", "a number above 0, at most 1")
    _check(_is_number(1e-6, 1e6), config, "routed_scaling_factor", "a number above 0")
    layers, last = config.mlp_only_layers, config.num_hidden_layers - 1
    is_list = isinstance(layers, (list, tuple))
    for layer in layers if is_list else [] if layers is None else [layers]:
        require(is_list and _is_int(0, last)(layer), "mlp_only_layers", layer, f"a list of layers, 0 to {last}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        ids = ids if isinstance(ids, list) and name == "eos_token_id" else [ids]
        right = all(i is None or _is_int(-1, MAX_SIZE)(i) for i in ids)  # -1: some checkpoints' "no padding"
        require(right, name, getattr(config, name), "the id of a token")


def normal_rope(given: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """rope_parameters with a rope_type and a rope_theta, checked; a key that its type does not know is an error."""
    require(isinstance(given, Mapping), "rope_parameters", given, "a mapping such as {rope_type: default}")
    rope = {"rope_type": given.get("type", "default"), "rope_theta": 10000.0, **given}
    rope.pop("type", None)
    rope.pop("finetuned", None)  # says where the weights came from
    partial = rope.pop("partial_rotary_factor", None)
    require(partial is None or partial == 1, "partial_rotary_factor", partial, "1.0")
    kind = rope["rope_type"]
    require(isinstance(kind, str) and kind in _ROPE, "rope_type", kind, f"one of {', '.join(_ROPE)}")
    if "original_max_position_embeddings" in _ROPE[kind][0]:
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
    names = ("rope_type", "rope_theta", *_ROPE[kind][0], *_ROPE[kind][1])
    for name, value in rope.items():
        require(value is None or name in names, f"rope_parameters.{name}", value, f"only {', '.join(names)} for {kind}")
    _check_rope(rope)
    return rope


def _check_rope(rope: Mapping[str, Any]) -> None:
    kind = rope["rope_type"]
    theta = rope["rope_theta"]
    require(_is_number(1, 1e30)(theta) and theta > 1, "rope_theta", theta, "a number above 1")
    required, optional = _ROPE[kind]
    for name in required:
        require(rope.get(name) is not None, f"rope_parameters.{name}", None, f"a number, as rope_type is {kind}")
    for name in (*required, *optional):
        value = rope.get(name)
        if value is None:
            continue
        if name == "truncate":
            require(isinstance(value, bool), f"rope_parameters.{name}", value, "true or false")
        elif name == "original_max_position_embeddings":
            require(_is_int(1, MAX_SIZE)(value), f"rope_parameters.{name}", value, "a whole number above 0")
        else:
            least = 1 if name == "factor" else 0
            right = _is_number(least, 1e6)(value) and value > 0
            require(right, f"rope_parameters.{name}", value, "a number, 1 or more" if least else "a number above 0")
    pairs = (("low_freq_factor", "high_freq_factor", 1, 4), ("beta_slow", "beta_fast", 1, 32))
    for low, high, low_default, high_default in pairs:
        if low in (*required, *optional):
            values = rope.get(low) or low_default, rope.get(high) or high_default
            require(values[0] < values[1], f"rope_parameters.{low}", values[0], f"less than {high}={values[1]}")


def check_parts(config: Any) -> None:
    """Heads, experts and groups that divide each other; `config` has its defaults filled in."""
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    if config.uses_mla:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            require(getattr(config, name) > 0, name, getattr(config, name), "a positive number for deepseek_v3")
    elif config.model_type == "llama":  # transformers refuses it, whatever head_dim says
        width = config.hidden_size
        require(width % heads == 0, "hidden_size", width, f"a multiple of num_attention_heads={heads} for llama")
    pad = config.pad_token_id
    require(pad is None or pad < config.vocab_size, "pad_token_id", pad, f"below vocab_size={config.vocab_size}")
    require(config.rope_dim % 2 == 0, "rotary dimension", config.rope_dim, "an even number")
    if not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        return
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    require(0 < chosen <= experts, "num_experts_per_tok", chosen, f"1 to n_routed_experts={experts}")
    require(config.moe_intermediate_size > 0, "moe_intermediate_size", config.moe_intermediate_size, "> 0")
    groups, kept = config.n_group, config.topk_group
    require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts={experts}")
    if config.uses_mla:  # a group is judged by its two best experts
        require(experts >= 2 * groups, "n_group", groups, "groups of at least 2 experts")
    require(kept <= groups, "topk_group", kept, f"1 to n_group={groups}")
    most = experts // groups * kept
    require(chosen <= most, "num_experts_per_tok", chosen, f"1 to {most}, the experts of topk_group={kept} groups")


def check_from_scratch(config: Any, given: Mapping[str, Any]) -> None:
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
    if given.get("n_routed_experts") and not any(config.is_moe_layer(i) for i in range(layers)):
        require(False, "n_routed_experts", given["n_routed_experts"], f"a layer with experts among the {layers}")
    if config.model_type == "qwen3_moe":
        require(config.n_routed_experts > 0, "num_experts", config.n_routed_experts, "a whole number above 0")


def router_problems(stage: Any, config: Any) -> Iterator[str]:
    """Options of a router, for a model that has none."""
    has_router = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    for name in ("router_bias_update_rate", "router_aux_loss_coef", "router_replay"):
        value = getattr(stage, name, 0)
        if value and not has_router:
            yield f"{name} = {value}: {config.model_type} has no router; drop it"
        elif value and name == "router_bias_update_rate" and not config.uses_mla:
            yield f"{name} = {value}: the router of {config.model_type} has no bias; leave it at 0"


def _check(test: Callable[[Any], bool], config: Any, name: str, expected: str) -> None:
    require(test(getattr(config, name)), name, getattr(config, name), expected)


def _is_int(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(least: float, most: float) -> Callable[[Any], bool]:
    def test(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and least <= value <= most  # neither holds of NaN

    return test
