"""What to sample (`SamplingParams`), what comes back (`Completion`), and which noise each token gets.

A token's noise is a function of (run seed, sequence id, sample index, position in the sequence) and nothing else, so
that a completion does not depend on the other rows of the batch, on when it enters it, or on how prompts are split
over calls and ranks. The four integers are folded into one 64-bit seed per row, in int64 tensor arithmetic.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1fast.models.model_config import ModelConfig

logger = logging.getLogger("r1fast")
FinishReason = Literal["stop", "length"]
DEFAULT_MAX_TOKENS = 1024  # where neither the caller nor generation_config.json says how many
# What generation_config.json may say of a default: our name, the type, and the value of transformers that means "off".
_DEFAULTS: dict[str, tuple[str, type | tuple[type, ...], Any]] = {
    "temperature": ("temperature", (int, float), None),
    "top_p": ("top_p", (int, float), None),
    "top_k": ("top_k", int, -1),
    "max_new_tokens": ("max_tokens", int, None),
}
_NOT_APPLIED: dict[str, Any] = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "no_repeat_ngram_size": 0, "num_beams": 1,
    "bad_words_ids": None, "suppress_tokens": None, "stop_strings": None,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; the words are vLLM's.

    n: completions per prompt. max_tokens: tokens per completion, the stop token included. min_tokens: no stop token is
    drawn before that many tokens. temperature 0 is greedy. top_p 1.0 and top_k 0 keep the whole vocabulary.
    stop: strings that end a completion (texts.py): its tokens are kept to the one that completed the first such string,
    its text ends before it, or with include_stop_str_in_output behind it. All is decoded under way then, which costs.
    stop_token_ids: end a completion like the model's own end-of-sequence tokens, which `ignore_eos` disables.
    """

    n: int = 1
    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for names, kind, expected in (
            (("n", "max_tokens", "min_tokens", "top_k", "seed"), Integral, "an integer"),
            (("temperature", "top_p"), Real, "a number"),
            (("stop", "stop_token_ids"), Iterable | None, "a list"),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ValueError(f"SamplingParams.{name} is {getattr(self, name)!r}; expected {expected}")
        stop_ids = self.stop_token_ids or ()
        are_texts = all(isinstance(text, str) and text for text in self.stop_strings)
        for name, right, expected in (
            ("n", self.n >= 1, "at least 1 completion per prompt"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens ({self.max_tokens})"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number >= 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1.0 keeps every token)"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 keeps every token)"),
            ("stop", are_texts, "a string or a list of strings, none of them empty"),
            ("stop_token_ids", all(isinstance(i, int) and i >= 0 for i in stop_ids), "token ids >= 0"),
        ):
            if not right:
                raise ValueError(f"SamplingParams.{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def default_params(generation_config: Mapping[str, Any], most_tokens: int) -> SamplingParams:
    """As vLLM's `generation_config="auto"`: temperature, top_p, top_k and max_new_tokens of generation_config.json, and
    our defaults for what it leaves out; `do_sample` counts for nothing. most_tokens: a bound on max_tokens.

    ValueError for a value that cannot be, a line in the log for penalties and the like, which are not applied.
    """
    values: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS}
    for key, (name, kind, off) in _DEFAULTS.items():
        value = generation_config.get(key)
        if value is None or value == off:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"generation_config.json: {key} is {value!r:.80}, expected a number; correct it there")
        values[name] = value
    values["max_tokens"] = min(values["max_tokens"], most_tokens)
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}; correct it there") from error
    if left_out := [f"{key} {generation_config[key]}" for key, off in _NOT_APPLIED.items()
                    if generation_config.get(key) not in (None, off)]:  # fmt: skip
        logger.warning("generation_config.json: %s: not applied", ", ".join(left_out))
    return params


@dataclass(slots=True)
class SampledTokens:
    """One continuation as it was sampled, before its text is known; the fields of Completion."""

    token_ids: list[int]
    logprobs: list[float]
    routed_experts: np.ndarray | None = None
    finish_reason: str | None = None  # as vLLM says it


@dataclass(slots=True)
class Completion:
    """One sampled continuation.

    token_ids hold the sampled tokens with the stop token, because the trainer learns from it; text leaves out the stop
    token and every end-of-sequence, padding and beginning-of-sequence token, and keeps all other special tokens (tags
    such as `<think>` may be special). logprobs are those of the untruncated tempered distribution, of the untempered
    one when greedy. finish_reason: "stop" if a stop token or string ended it, "length" if max_tokens did.
    routed_experts: int16 [prompt + completion - 1, L, K], the experts of every token but the last in each of the L MoE
    layers, if asked for.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = None


def stop_ids_of(params: SamplingParams, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Every token that ends a completion, sorted."""
    asked = set(params.stop_token_ids or ())
    if asked and max(asked) >= config.vocab_size:
        raise ValueError(
            f"stop_token_ids has {max(asked)}; expected ids below the vocabulary size, {config.vocab_size}"
        )
    eos_ids = set() if params.ignore_eos else eos_token_ids(config, tokenizer)
    # A string that is a token which texts leave out could not be found in them.
    by_name = set()
    if tokenizer is not None and (strings := params.stop_strings):
        by_name = {i for i in _left_out(config, tokenizer) if str(tokenizer.convert_ids_to_tokens(i)) in strings}
    return sorted(i for i in asked | eos_ids | by_name if i < config.vocab_size)


def eos_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """End-of-sequence tokens of the model's configuration (one or several) and of the tokenizer."""
    eos = config.eos_token_id
    found = [*(eos if isinstance(eos, (list, tuple)) else [eos]), tokenizer.eos_token_id if tokenizer else None]
    return {i for i in found if i is not None}


def completion_text(ids: Sequence[int], config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Of a completion whose stop token is left out already; see Completion."""
    return text_decoder(config, tokenizer)(ids)


def text_decoder(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Sequence[int]], str]:
    """completion_text of many; without a tokenizer texts are empty."""
    if tokenizer is None:
        return lambda ids: ""
    dropped = _left_out(config, tokenizer)

    def decode(ids: Sequence[int]) -> str:
        # Not skip_special_tokens: tags such as <think> are special tokens in some vocabularies, and rewards read them.
        shown = [i for i in ids if i not in dropped]
        return tokenizer.batch_decode([shown], skip_special_tokens=False, clean_up_tokenization_spaces=False)[0]

    return decode


def _left_out(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    padding_and_bos = {tokenizer.pad_token_id, tokenizer.bos_token_id}
    return eos_token_ids(config, tokenizer) | {i for i in padding_and_bos if i is not None}


def sample_keys(seed: int, sequence_ids_N: Tensor, sample_ids_N: Tensor) -> Tensor:
    """int64 [N]: the key of each sample's noise stream, from int64 sequence and sample ids."""
    key = torch.full_like(sequence_ids_N, _signed(seed))
    return fold_in(fold_in(_splitmix64(key), sequence_ids_N), sample_ids_N)


def fold_in(keys_N: Tensor, values_N: Tensor) -> Tensor:
    """int64 [N]: new keys from keys and values; one-to-one in the value, so a stream never repeats a seed."""
    return _splitmix64(keys_N ^ values_N)


def _splitmix64(x_N: Tensor) -> Tensor:
    """Steele et al. 2014, "Fast splittable pseudorandom number generators"; int64 wraps around as uint64 does."""

    def shift_right(bits: int) -> Tensor:  # torch shifts int64 arithmetically, which would copy the sign bit
        return (x_N >> bits) & ((1 << (64 - bits)) - 1)

    x_N = x_N + _signed(0x9E3779B97F4A7C15)
    x_N = (x_N ^ shift_right(30)) * _signed(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ shift_right(27)) * _signed(0x94D049BB133111EB)
    return x_N ^ shift_right(31)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
