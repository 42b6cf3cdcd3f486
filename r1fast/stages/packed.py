"""Token sequences on their way into the model: encoding, and packing into batches with no padding.

p p p c c c (c) | p p c c (c) | p p p p c (c)    inputs: every token but the last of each sequence
    ^ ^ ^ ^         ^ ^ ^             ^ ^        loss_index: positions whose next token is learned from
cu_seqlens [0, 6, 10, 15]   loss_cu_seqlens [0, 4, 7, 9]

Where examples of one prompt are many, the model is given it once, but for its last token, whose next one each learns:
p p p c c c (c) | p d d (d)    of the sequences p p p c c c | p p p d d    shared [0 1 2 3 4 5 0 1 6 7 8]
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from r1fast.config import ConfigError
from r1fast.data.rows import location, prompt_and_target
from r1fast.data.templates import (
    RESPONSE_FORMATS,
    Messages,
    check_variables,
    render_prompt,
    target_text,
    without_opening,
)
from r1fast.rollout.tokenization import encode_text_prompts, encode_texts
from r1fast.schema import PretrainStage
from r1fast.schema_options import FitOptions, GenerateOptions

T = TypeVar("T")
Text = str | Messages


@dataclass(slots=True)
class Example:
    """A prompt and what follows it. values: per completion token (lists) or per sequence (numbers), for the loss.

    routed_experts: [num_inputs, L, K], where the sampler recorded them; of all examples of a step, or of none.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    values: dict[str, Any] = field(default_factory=dict)
    routed_experts: np.ndarray | None = None
    learned: bool = True  # False: the model reads it, and no loss or log-prob does

    @property
    def num_learned(self) -> int:
        return len(self.completion_ids) if self.learned else 0

    @property
    def num_inputs(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids) - 1

    @property
    def num_shared(self) -> int:
        """Inputs that examples of the same prompt have in common."""
        return len(self.prompt_ids) - 1

    def prompt(self) -> tuple[Any, ...]:
        """What makes prompts the same: their tokens, and the experts that these took."""
        routed = self.routed_experts
        return *self.prompt_ids, None if routed is None else routed[: self.num_shared].tobytes()


@dataclass(slots=True)
class PackedBatch:
    input_ids_T: Tensor
    cu_seqlens: Tensor  # int32 [N + 1], of the sequences: of the inputs, unless they share prompts
    loss_index_M: Tensor  # positions of the inputs whose next token is learned from
    target_ids_M: Tensor
    loss_cu_seqlens: Tensor  # int32 [N + 1], of the learned tokens; fewer where examples are not learned
    values: dict[str, Tensor]  # of the learned examples
    routed_TLK: Tensor | None = None  # int64, the experts that the sampler took; of every token of the sequences
    shared_S: Tensor | None = None  # int64, the input that a token of the sequences is, where prompts are given once


def num_repeated(examples: Sequence[Example]) -> int:
    """Inputs that are not given again, as an example before has the same prompt."""
    once = {example.prompt(): example.num_shared for example in examples}
    repeated = sum(example.num_shared for example in examples) - sum(once.values())
    return worthwhile(repeated, sum(example.num_inputs for example in examples))


def worthwhile(num_repeated: int, num_inputs: int) -> int:
    """The former, or 0 up to a sixteenth of all, which is about what attention has to copy then."""
    return num_repeated if num_repeated * 16 > num_inputs else 0


def collate(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """Pack examples; every prompt has at least one token."""
    inputs, targets, index, shared = list[int](), list[int](), list[int](), list[int]()
    ends, loss_ends = [0], [0]
    begins: dict[tuple[Any, ...], int] = {}
    shares = num_repeated(examples) > 0
    for example in examples:
        begin = begins.setdefault(example.prompt(), len(inputs)) if shares else len(inputs)
        known = example.num_shared if begin < len(inputs) else 0
        own = example.prompt_ids[known:] + example.completion_ids[:-1]
        shared.extend((*range(begin, begin + known), *range(len(inputs), len(inputs) + len(own))))
        if example.learned:
            first = len(inputs) + example.num_shared - known
            index.extend(range(first, first + len(example.completion_ids)))
            targets.extend(example.completion_ids)
            loss_ends.append(len(targets))
        inputs += own
        ends.append(len(shared))
    values: dict[str, Tensor] = {}
    learned = [example for example in examples if example.learned]
    for name in learned[0].values if learned else ():
        column = [example.values[name] for example in learned]
        flat = [x for xs in column for x in xs] if isinstance(column[0], list) else column
        values[name] = torch.tensor(flat, dtype=torch.float32, device=device)
    routed = [example.routed_experts for example in examples if example.routed_experts is not None]
    inputs_T, index_M, targets_M = (torch.tensor(x, dtype=torch.long, device=device) for x in (inputs, index, targets))
    cu_seqlens, loss_cu_seqlens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, loss_ends))
    routed_TLK = torch.from_numpy(np.concatenate(routed)).to(device, torch.int64) if routed else None
    shared_S = torch.tensor(shared, dtype=torch.long, device=device) if len(shared) > len(inputs) else None
    return PackedBatch(inputs_T, cu_seqlens, index_M, targets_M, loss_cu_seqlens, values, routed_TLK, shared_S)


@lru_cache(maxsize=32)  # an epoch of each domain, or of all rows
def permutation(size: int, seed: str) -> tuple[int, ...]:
    """Numbers below size in an order that depends on the seed alone."""
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def of_step(step: int, size: int, batch_size: int, seed: int) -> Sequence[int]:
    """The numbers below size that a step takes: all of them in each epoch, which ends with a smaller step."""
    epoch, place = divmod(step, -(-size // batch_size))
    return permutation(size, f"{seed},{epoch}")[place * batch_size : (place + 1) * batch_size]


def empty_batch(device: torch.device) -> PackedBatch:
    """Two tokens and nothing to learn: a rank that has no work left still takes part in every collective."""
    return collate([Example([0, 0], [], {})], device)


class Prompt(NamedTuple):
    ids: list[int]
    prefilled: bool  # it opens the reasoning itself: prefill_think, or a chat template that does


def encode_prompts(rows: Sequence[dict], tokenizer: Tokenizer, options: GenerateOptions) -> list[Prompt]:
    """The prompts of rows (text or chat messages) in the stage's template.

    Of special tokens a prompt has what the template writes. Our own templates also get what the tokenizer puts before a
    text by default, once; its own chat template is taken to be complete, as transformers does. ConfigError naming the
    first row that cannot be encoded.
    """

    def encode(part: Sequence[dict]) -> list[Prompt]:
        texts = render_prompts([row["prompt"] for row in part], tokenizer, options, tools=tools_of(part))
        return encode_rendered(texts, tokenizer, options)

    return of_rows(rows, encode)


def render_prompts(
    prompts: Sequence[Text], tokenizer: Tokenizer | None, options: GenerateOptions, *, tools: Sequence[Any] = ()
) -> list[str]:
    """tools: of each prompt the functions that the model may call, or None."""
    how: dict[str, Any] = {"response_format": options.response_format, "prefill_think": options.prefill_think}
    given = options.chat_template_kwargs
    if given and tokenizer is not None:
        check_variables(str(tokenizer.chat_template), tuple(given))
    return [
        render_prompt(
            prompt, options.prompt_template, tokenizer=tokenizer,
            variables={**given, "tools": offered, "today": options.today}, **how,
        )
        for prompt, offered in zip(prompts, tools or repeat(None, len(prompts)), strict=True)
    ]  # fmt: skip


def tools_of(rows: Sequence[dict]) -> list[Any]:
    return [row.get("tools") for row in rows]


def encode_rendered(texts: Sequence[str], tokenizer: Tokenizer, options: GenerateOptions) -> list[Prompt]:
    layout = RESPONSE_FORMATS[options.response_format]
    encode = encode_texts if options.prompt_template == "tokenizer" else encode_text_prompts
    ids = encode(texts, tokenizer)
    if [] in ids:
        raise ValueError("the prompt is empty, and the tokenizer puts no BOS token before it; drop the row")
    return [Prompt(x, layout.is_prefilled(text)) for x, text in zip(ids, texts, strict=True)]


def encode_examples(rows: Sequence[dict], tokenizer: Tokenizer, options: GenerateOptions) -> list[Example]:
    """Rows {prompt, completion}, {messages} or {text} as examples that end with the EOS token.

    Plain text, and prompts where pretrain does not mask them, are learned from their first token on. ConfigError naming
    the first row that cannot be encoded.
    """
    eos = tokenizer.eos_token_id
    mask_prompt = not isinstance(options, PretrainStage) or options.mask_prompt

    def encode(part: Sequence[dict]) -> list[Example]:
        prompts, targets = zip(*map(prompt_and_target, part), strict=True) if part else ((), ())
        prompt_ids, target_ids = encode_with_targets(prompts, targets, tokenizer, options, tools_of(part))
        if [] in target_ids:
            gone = "without its end token, and what the prompt holds already"
            raise ValueError(f"{gone}, nothing is left to learn; drop the row")
        return [
            Example(p, [*c, eos]) if mask_prompt and prompt is not None else Example(p[:1], [*p[1:], *c, eos])
            for prompt, p, c in zip(prompts, prompt_ids, target_ids, strict=True)
        ]

    return of_rows(rows, encode)


def encode_with_targets(
    prompts: Sequence[Text | None],
    targets: Sequence[Text],
    tokenizer: Tokenizer,
    options: GenerateOptions,
    tools: Sequence[Any],
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts (None: text without one) and of what follows each: text, or a chat's last turn.

    A target loses what is there already or will be: the opening of the reasoning if the prompt ends with it, and EOS.
    """
    layout = RESPONSE_FORMATS[options.response_format]
    texts = [_without_eos(target_text(target, layout), tokenizer) for target in targets]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompt_ids = [[start] for _ in prompts]
    asked = {i: prompt for i, prompt in enumerate(prompts) if prompt is not None}
    rendered = render_prompts(list(asked.values()), tokenizer, options, tools=[tools[i] for i in asked])
    for i, text, (ids, _) in zip(asked, rendered, encode_rendered(rendered, tokenizer, options), strict=True):
        prompt_ids[i], texts[i] = ids, without_opening(texts[i], text, layout)
    return prompt_ids, encode_texts(texts, tokenizer)


def of_rows(rows: Sequence[dict], encode: Callable[[Sequence[dict]], list[T]]) -> list[T]:
    """encode(rows) as one batch; where that raises ValueError, ConfigError naming the first row that raises it."""
    try:
        return encode(rows)
    except ValueError as error:
        first, last, cause = 0, len(rows), error
        while last - first > 1:
            middle = (first + last) // 2
            try:
                encode(rows[first:middle])
                first = middle
            except ValueError:
                last = middle
        try:  # alone, so that an index in the message is its own
            encode(rows[first:last])
        except ValueError as found:
            cause = found
        raise ConfigError(f"{location(rows[first], first)}: {cause}") from cause


def _without_eos(text: str, tokenizer: Tokenizer) -> str:
    """Some data sets write the end token themselves, and templates a line break after it."""
    while tokenizer.eos_token and (stripped := text.rstrip()).endswith(tokenizer.eos_token):
        text = stripped.removesuffix(tokenizer.eos_token)
    return text


def length_problems(units: Sequence[Sequence[Example]], rows: Sequence[dict], stage: FitOptions) -> Iterator[str]:
    """Every example fits into max_length, and what must stay together (one unit a row) into a micro-batch."""
    for i, (unit, row) in enumerate(zip(units, rows, strict=True)):
        longest, total = max(example.num_inputs + 1 for example in unit), sum(example.num_inputs for example in unit)
        begin = repr(next((str(row[name]) for name in ("prompt", "messages", "text") if row.get(name)), ""))[:60]
        for name, length in (("max_length", longest), ("max_tokens_per_microbatch", total)):
            if length > (limit := getattr(stage, name)):
                problem = f"the row {begin} has {length} tokens, more than {name} = {limit}"
                yield f"{location(row, i)}: {problem}; raise it or shorten the row"


def prompt_length_problems(
    prompts: Sequence[list[int]], rows: Sequence[dict], stage: GenerateOptions, positions: int
) -> Iterator[str]:
    """Every prompt fits into max_prompt_length, and with its completion into the positions of the model."""
    for i, (ids, row) in enumerate(zip(prompts, rows, strict=True)):
        if len(ids) > stage.max_prompt_length:
            problem = f"more than max_prompt_length = {stage.max_prompt_length}; raise it or drop the row"
        elif len(ids) + (longest := stage.max_completion_length) > positions:
            room = f"the {positions} positions of the model (max_position_embeddings)"
            problem = f"with max_completion_length = {longest} more than {room}; lower it or drop the row"
        else:
            continue
        yield f"{location(row, i)} ({str(row['prompt'])[:60]!r}) has {len(ids)} prompt tokens, {problem}"
