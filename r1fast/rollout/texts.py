"""Completions as text: which of their tokens are shown, where a stop string ends them, pieces while they are sampled.

    tokens    A | ns | wer | : 4 < | / | ans | wer | > . | 7          stop "</answer>"
    kept      A | ns | wer | : 4 < | / | ans | wer | > .               up to the token that completed it
    text      A   ns   wer   : 4                                       up to the string, or with it; never what follows

Of several strings that one counts which is complete first, as if tokens were characters. Looked for in the text of the
completion alone, wherever its tokens meet, and not in its first min_tokens tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from r1fast.models.model_config import ModelConfig
from r1fast.rollout.sampling import Completion, FinishReason, SampledTokens, SamplingParams, stop_ids_of, text_decoder

OnText = Callable[[int, int, str], object]  # of prompt and sample, a piece of its text
_INCOMPLETE = "�"  # how the bytes of a character decode that lacks some
_MOST_PENDING = 64  # tokens: a character has at most four bytes, and this many in a row are noise


def completions_of(
    sampled: Sequence[SampledTokens],
    params: SamplingParams,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[Completion]]:
    """Of each prompt, whose samples follow each other; what was sampled after a stop string is gone.

    FloatingPointError when a log-prob is NaN or infinite: then so were the logits, and the tokens mean nothing.
    """
    if bad := sum(not math.isfinite(sum(sample.logprobs)) for sample in sampled):
        raise FloatingPointError(
            f"the model's logits are not finite in {bad} of {len(sampled)} completions: its weights hold NaN or Inf, "
            "or overflow in its dtype; take an earlier checkpoint, or another dtype"
        )
    texts = Texts(params, config, tokenizer)
    completions = []
    for x in map(texts.cut, sampled):
        text, reason = texts.of(x.token_ids)
        completions.append(Completion(text, x.token_ids, x.logprobs, reason, x.routed_experts))
    return [completions[start : start + params.n] for start in range(0, len(completions), params.n)]


class Texts:
    """How the tokens of one call of `generate` read. ValueError for stop strings without a tokenizer."""

    def __init__(self, params: SamplingParams, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.stop = params.stop_strings
        if self.stop and tokenizer is None:
            raise ValueError("SamplingParams.stop is text, and there is no tokenizer; give one, or stop_token_ids")
        self.params, self.tokenizer = params, tokenizer
        self.stop_ids = set(stop_ids_of(params, config, tokenizer))
        self.decode = text_decoder(config, tokenizer)

    def of(self, ids: Sequence[int]) -> tuple[str, FinishReason]:
        """The text of a completion, and why it ended; of one that `cut` has left as it is."""
        by_token = ids[-1] in self.stop_ids
        text, stop = self.decode(ids[:-1] if by_token else ids), self.find(ids)
        if stop is not None:
            text = text[: stop[1] if self.params.include_stop_str_in_output else stop[0]]
        elif by_token and self.params.include_stop_str_in_output and self.tokenizer is not None:
            token = self.tokenizer.convert_ids_to_tokens(ids[-1])
            text += token if token in self.stop else ""  # a string that is a special token, which texts leave out
        return text, "stop" if by_token or stop is not None else "length"

    def find(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Where in the text of these tokens a stop string begins and ends."""
        if not self.stop or len(ids) <= self.params.min_tokens:
            return None
        begin = len(self.decode(ids[: self.params.min_tokens])) if self.params.min_tokens else 0
        return first_stop(self.decode(ids[:-1] if ids[-1] in self.stop_ids else ids), self.stop, begin)

    def cut(self, sample: SampledTokens) -> SampledTokens:
        """Without the tokens after a stop string; vLLM samples on, as it is given no text."""
        ids = sample.token_ids
        if len(ids) < 2 or self.find(ids[:-1]) is None:
            return sample
        reader, kept = Reader(self), 0
        while not reader.is_at_stop:
            kept += 1
            reader.push(ids[kept - 1])
        experts, gone = sample.routed_experts, len(ids) - kept
        experts = None if experts is None else experts[: len(experts) - gone]
        return replace(sample, token_ids=ids[:kept], logprobs=sample.logprobs[:kept], routed_experts=experts)


def first_stop(text: str, stop: Sequence[str], begin: int = 0) -> tuple[int, int] | None:
    """Begin and end of the stop string that ends first, of two that end there the longer; ends up to `begin` are not
    counted."""
    starts = [(text.find(string, max(0, begin + 1 - len(string))), len(string)) for string in stop]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return min(found)[::-1] if found else None


@dataclass
class Reader:
    """The text of one completion while its tokens come, decoded a few at a time."""

    texts: Texts
    ids: list[int] = field(default_factory=list)
    text: str = ""  # that no later token changes
    pending: str = ""  # that the next one may: it ends within a character
    is_at_stop: bool = False
    _begin: int = 0  # tokens from here on are decoded together, as some decode differently at the start of a text
    _known: int = 0  # and up to here they are in `text`
    _before: str = ""  # the text of those between

    def push(self, token_id: int) -> None:
        self.ids.append(token_id)
        now = self.texts.decode(self.ids[self._begin :])
        self.pending = now[len(self._before) :]
        if self.texts.stop:
            longest = max(map(len, self.texts.stop))
            tail = self.text[max(0, len(self.text) - longest) :] + self.pending
            # The tail is decoded apart from the rest: the whole text decides.
            self.is_at_stop = any(x in tail for x in self.texts.stop) and self.texts.find(self.ids) is not None
        if not self.pending.endswith(_INCOMPLETE) or len(self.ids) - self._known > _MOST_PENDING:
            self.text += self.pending
            self.pending = ""
            self._begin, self._known = self._known, len(self.ids)
            self._before = self.texts.decode(self.ids[self._begin :])


class Watcher:
    """Reads completions as they are sampled (scheduler.py): ends them at stop strings, hands their text on."""

    def __init__(self, texts: Texts, on_text: OnText | None) -> None:
        self.texts, self.on_text = texts, on_text
        self.readers: dict[int, Reader] = {}
        self.num_shown: dict[int, int] = {}  # characters

    def see(self, index: int, ids: Sequence[int], *, has_ended: bool) -> int | None:
        """New tokens of a sample, by its place in the output. How many of its tokens are kept if it ends with them, or
        before; None where it goes on."""
        reader = self.readers.setdefault(index, Reader(self.texts))
        for token_id in ids:
            if token_id in self.texts.stop_ids:  # the last one, which texts leave out
                reader.ids.append(token_id)
                break
            reader.push(token_id)
            if reader.is_at_stop:
                break
        ends = has_ended or reader.is_at_stop
        if self.on_text is not None:
            self._show(index, self.texts.of(reader.ids)[0] if ends else self._certain(reader.text))
        if ends:
            del self.readers[index]
        return len(reader.ids) if ends else None

    def _certain(self, text: str) -> str:
        """Without what may be the beginning of a stop string."""
        begun = (n for x in self.texts.stop for n in range(len(x) - 1, 0, -1) if text.endswith(x[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _show(self, index: int, text: str) -> None:
        assert self.on_text is not None
        shown = self.num_shown.get(index, 0)
        if len(text) > shown:
            self.num_shown[index] = len(text)
            self.on_text(*divmod(index, self.texts.params.n), text[shown:])
