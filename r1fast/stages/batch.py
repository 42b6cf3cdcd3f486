"""Token sequences on their way into the model: encoding, and packing into batches with no padding.

p p p c c c (c) | p p c c (c) | p p p p c (c)    inputs: every token but the last of each sequence
    ^ ^ ^ ^         ^ ^ ^             ^ ^        loss_index: positions whose next token is learned from
cu_seqlens [0, 6, 10, 15]   loss_cu_seqlens [0, 4, 7, 9]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1fast.config import ConfigError
from r1fast.data.templates import RESPONSE_FORMATS, render_prompt


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


@dataclass(slots=True)
class Batch:
    input_ids_T: Tensor
    cu_seqlens: Tensor  # int32 [N + 1], of the inputs
    loss_index_M: Tensor  # positions of the inputs whose next token is learned from
    target_ids_M: Tensor
    loss_cu_seqlens: Tensor  # int32 [N + 1], of the learned tokens; fewer where examples are not learned
    values: dict[str, Tensor]  # of the learned examples
    routed_TLK: Tensor | None = None  # int64, the experts that the sampler took


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """Pack examples; every prompt has at least one token."""
    inputs: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    ends, loss_ends = [0], [0]
    for example in examples:
        if example.learned:
            first = len(inputs) + len(example.prompt_ids) - 1
            index.extend(range(first, first + len(example.completion_ids)))
            targets.extend(example.completion_ids)
            loss_ends.append(len(targets))
        inputs.extend(example.prompt_ids)
        inputs.extend(example.completion_ids[:-1])
        ends.append(len(inputs))
    values: dict[str, Tensor] = {}
    learned = [example for example in examples if example.learned]
    for name in learned[0].values if learned else ():
        column = [example.values[name] for example in learned]
        flat = [x for xs in column for x in xs] if isinstance(column[0], list) else column
        values[name] = torch.tensor(flat, dtype=torch.float32, device=device)
    routed = [example.routed_experts for example in examples if example.routed_experts is not None]
    return Batch(
        torch.tensor(inputs, dtype=torch.long, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(index, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        torch.tensor(loss_ends, dtype=torch.int32, device=device),
        values,
        torch.from_numpy(np.concatenate(routed)).to(device, torch.int64) if routed else None,
    )


def empty_batch(device: torch.device) -> Batch:
    """Two tokens and nothing to learn: a rank that has no work left still takes part in every collective."""
    return collate([Example([0, 0], [], {})], device)


class Prompt(NamedTuple):
    ids: list[int]
    prefilled: bool  # it opens the reasoning itself: prefill_think, or a chat template that does


def encode_prompts(prompts: Sequence[Any], tokenizer: Any, options: Any) -> list[Prompt]:
    """Prompts (text or chat messages) in the stage's template, with the BOS token exactly once."""
    render = {"response_format": options.response_format, "prefill_think": options.prefill_think}
    texts = [render_prompt(prompt, options.prompt_template, tokenizer=tokenizer, **render) for prompt in prompts]
    layout = RESPONSE_FORMATS[options.response_format]
    ids = with_bos(encode_texts(texts, tokenizer), tokenizer)
    return [Prompt(row, layout.is_prefilled(text)) for row, text in zip(ids, texts, strict=True)]


def with_bos(ids: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """Every row led by the BOS token exactly once, if the tokenizer has one; templates may have written it."""
    bos = tokenizer.bos_token_id
    if bos is None and [] in ids:
        raise ValueError(f"row {ids.index([])} has an empty prompt, and the tokenizer no BOS token; drop the row")
    return ids if bos is None else [row if row[:1] == [bos] else [bos, *row] for row in ids]


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []


def encode_examples(rows: Sequence[dict], tokenizer: Any, options: Any, *, mask_prompt: bool = True) -> list[Example]:
    """Rows {prompt, completion}, {messages} or {text} as examples that end with the EOS token.

    Plain text, and prompts where mask_prompt is False, are learned from their first token on.
    """
    prompts, completions, masked = [], [], []
    for row in rows:
        if row.get("messages"):
            messages = row["messages"]
            prompts.append(messages[:-1])
            completions.append(messages[-1]["content"])
        elif row.get("prompt") is not None:
            prompts.append(row["prompt"])
            completions.append(row["completion"])
        else:
            prompts.append(None)
            completions.append(row["text"])
        masked.append(mask_prompt and prompts[-1] is not None)
    encoded = iter(encode_prompts([p for p in prompts if p is not None], tokenizer, options))
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    opening = RESPONSE_FORMATS[options.response_format].prefill
    prompt_ids = []
    for i, prompt in enumerate(prompts):
        ids, prefilled = (start, False) if prompt is None else next(encoded)
        prompt_ids.append(ids)
        if prefilled:  # then the prompt ends with it
            completions[i] = completions[i].removeprefix(opening)
    completion_ids = [[*ids, tokenizer.eos_token_id] for ids in encode_texts(completions, tokenizer)]
    return [
        Example(p, c) if keep else Example(p[:1], p[1:] + c)
        for p, c, keep in zip(prompt_ids, completion_ids, masked, strict=True)
    ]


def check_lengths(units: Sequence[Sequence[Example]], rows: Sequence[dict], stage: Any) -> None:
    """Every example fits into max_length, and what must stay together (one unit a row) into a micro-batch."""
    for unit, row in zip(units, rows, strict=True):
        shown = repr(next((str(row[name]) for name in ("prompt", "messages", "text") if row.get(name)), ""))[:60]
        longest, total = max(example.num_inputs + 1 for example in unit), sum(example.num_inputs for example in unit)
        for name, length in (("max_length", longest), ("max_tokens_per_microbatch", total)):
            if length > getattr(stage, name):
                raise ConfigError(
                    f"stages.{stage.name}: the row {shown} has {length} tokens, more than {name} = "
                    f"{getattr(stage, name)}; raise it or shorten the row"
                )
