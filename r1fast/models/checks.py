"""What the fields of an architecture may hold, each alone, and the parameters of its rotary embedding.

Every error is a ValueError that names the field in Hugging Face's word, what was got, and what was expected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_SIZE = 2**31 - 1  # ops count in int32
MAX_LAYERS, MAX_EXPERTS = 10_000, 2**15 - 1  # rollouts keep the experts of a token as int16


@dataclass(frozen=True)
class Values:
    """What a field may hold, and how an error says it."""

    accepts: Callable[[Any], bool]
    expected: str

    def check(self, name: str, value: Any) -> None:
        require(self.accepts(value), name, value, self.expected)

    def or_null(self) -> "Values":
        return Values(lambda value: value is None or self.accepts(value), f"{self.expected}, or null")


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        text = repr(got)
        raise ValueError(f"model config: {name}={text if len(text) <= 60 else text[:57] + '...'}, expected {expected}")


def whole(least: int, most: int, expected: str) -> Values:
    return Values(lambda value: type(value) is int and least <= value <= most, expected)


def number(least: float, most: float, expected: str) -> Values:
    # Neither comparison holds of NaN.
    return Values(lambda value: type(value) in (int, float) and least <= value <= most, expected)


FLAG = Values(lambda value: isinstance(value, bool), "true or false")
SIZE = whole(1, MAX_SIZE, "a whole number above 0")
COUNT = whole(0, MAX_SIZE, "a whole number, 0 or more")
TOKEN = whole(-1, MAX_SIZE, "the id of a token").or_null()  # -1: some checkpoints' "no padding"
CAP = number(1e-6, 1e6, "a number above 0").or_null()
TOKENS = Values(lambda ids: all(map(TOKEN.accepts, ids if isinstance(ids, list) else [ids])), TOKEN.expected)

_ABOVE_0 = number(1e-30, 1e6, "a number above 0")
_NUMBERS_ABOVE_0 = Values(
    lambda given: isinstance(given, list) and bool(given) and all(map(_ABOVE_0.accepts, given)), "a list of numbers"
)
_ROPE_VALUES = {  # any other is a number above 0
    "factor": number(1, 1e6, "a number, 1 or more"),
    "original_max_position_embeddings": SIZE,
    "truncate": FLAG,
    "short_factor": _NUMBERS_ABOVE_0,
    "long_factor": _NUMBERS_ABOVE_0,
    "partial_rotary_factor": number(1e-3, 1, "a number above 0, at most 1"),
}
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # rope_type -> (required, optional)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")),
}


def normal_rope(given: Mapping[str, Any], max_position_embeddings: int, *, partial: bool = False) -> dict[str, Any]:
    """rope_parameters with a rope_type and a rope_theta, checked; a key that its type does not know is an error.

    partial: a partial_rotary_factor is one that it may know.
    """
    require(isinstance(given, Mapping), "rope_parameters", given, "a mapping such as {rope_type: default}")
    rope = {"rope_type": given.get("type", "default"), "rope_theta": 10000.0, **given}
    rope.pop("type", None)
    rope.pop("finetuned", None)  # says where the weights came from
    share = rope.pop("partial_rotary_factor", None)
    require(partial or share in (None, 1), "partial_rotary_factor", share, "1.0")
    if share not in (None, 1):
        rope["partial_rotary_factor"] = share
    kind, theta = rope["rope_type"], rope["rope_theta"]
    require(isinstance(kind, str) and kind in _ROPE, "rope_type", kind, f"one of {', '.join(_ROPE)}")
    require(number(1, 1e30, "").accepts(theta) and theta > 1, "rope_theta", theta, "a number above 1")
    required, optional = _ROPE[kind]
    if "original_max_position_embeddings" in required:
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
    for name in required:
        require(rope.get(name) is not None, f"rope_parameters.{name}", None, f"a number, as rope_type is {kind}")
    names = ("rope_type", "rope_theta", *required, *optional, *(["partial_rotary_factor"] if partial else []))
    for name, value in rope.items():
        require(value is None or name in names, f"rope_parameters.{name}", value, f"only {', '.join(names)} for {kind}")
        if value is not None and name not in ("rope_type", "rope_theta"):
            _ROPE_VALUES.get(name, _ABOVE_0).check(f"rope_parameters.{name}", value)
    for low, high, low_default, high_default in (
        ("low_freq_factor", "high_freq_factor", 1, 4), ("beta_slow", "beta_fast", 1, 32)
    ):  # fmt: skip
        least, most = rope.get(low) or low_default, rope.get(high) or high_default
        require(least < most, f"rope_parameters.{low}", least, f"less than {high}={most}")
    return rope
