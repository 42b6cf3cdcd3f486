"""Generation with the trainer's own weights: the engine that callers see. How rows decode together: scheduler.py."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from r1fast.models.cache import BlockCache, free_memory
from r1fast.models.decoder import Decoder
from r1fast.rollout.admission import Sample, SequenceGroup, num_blocks_of
from r1fast.rollout.graphs import CAPTURES, StepGraphs
from r1fast.rollout.needs import RESERVE, Call, work_bytes
from r1fast.rollout.sampling import (
    Completion,
    SamplingParams,
    default_params,
    sample_keys,
)
from r1fast.rollout.scheduler import Limits, Scheduler
from r1fast.rollout.texts import OnText, Texts, Watcher, completions_of
from r1fast.rollout.tokenization import Chat, RawPrompt, encode_raw_prompts, is_chat
from r1fast_kernels.dispatch import in_use

_LENGTH = "max_tokens (in a recipe max_completion_length)"


class OutOfRoom(ValueError):
    """What a call of `generate` takes is more than there is; found before any work."""


@dataclass(eq=False, repr=False)
class RolloutEngine:
    """Samples completions from `model`, a Decoder whose parameters are plain tensors while `generate` runs."""

    model: Decoder
    tokenizer: PreTrainedTokenizerBase | None  # None: prompts are token ids, and texts are not needed
    max_num_seqs: int = 256  # rows decoded at the same time; a step reads the weights once for all: decode wide
    max_model_len: int | None = None  # longest prompt + completion; None: the model's max_position_embeddings
    max_num_batched_tokens: int = 8192  # prompt tokens of one prefill; longer prompts are computed in parts
    # Keys and values never take more, while `generate` runs; None: what the rows need at most, or what is free. With
    # less than the rows need, fewer of them run.
    kv_cache_memory_bytes: int | None = None
    enable_return_routed_experts: bool = False  # completions say where each token went, for an update to replay
    enforce_eager: bool = False  # no CUDA graphs (graphs.py); never under `use("reference")`
    memory_share: float = 1.0  # of what is free, that a call may take where kv_cache_memory_bytes is None

    def __post_init__(self) -> None:
        if self.model.scalar_head:
            raise ValueError("the model is a reward model (a `score` head); expected a language model")
        if self.enable_return_routed_experts and not self.model.config.has_router:
            raise ValueError("enable_return_routed_experts: the model has no mixture-of-experts layer")
        limit = self.model.config.max_position_embeddings
        length = limit if self.max_model_len is None else self.max_model_len
        budget = 1 if self.kv_cache_memory_bytes is None else self.kv_cache_memory_bytes
        for name, number, least, most, expected in (
            ("max_num_seqs", self.max_num_seqs, 1, None, "at least 1 row"),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1, None, "at least 1 token"),
            ("max_model_len", length, 2, limit, f"2 to {limit}, the model's max_position_embeddings"),
            ("kv_cache_memory_bytes", budget, 1, None, "a number of bytes, or None"),
        ):
            is_number = isinstance(number, Integral) and not isinstance(number, bool)
            if not is_number or number < least or (most is not None and number > most):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; expected {expected}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share is {self.memory_share!r:.80}; expected above 0, at most 1")
        self.longest = length

    def default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` take where no params are given: the checkpoint's generation_config.json, and for
        what it leaves out our own, max_tokens 1024 (at most what max_model_len has room for)."""
        return default_params(self.model.generation_config, self.longest - 1)

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        params: SamplingParams | None = None,
        *,
        sequence_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        on_text: OnText | None = None,
    ) -> list[list[Completion]]:
        """As `generate`, of one conversation ([{"role", "content"}, ..]) or a list of them, by the tokenizer's chat
        template: that of a model trained here renders the prompts of its training.

        chat_template_kwargs: variables of the template, and `tools`. continue_final_message: the last message is the
        assistant's, and completions go on with it. ValueError also for what the template cannot render.
        """
        expected = 'messages, [{"role": "user", "content": "..."}]; generate takes text as it is'
        conversations = cast(list[Chat], [messages] if is_chat(messages) else _listed(messages, "messages", expected))
        for index, chat in enumerate(conversations):
            if not is_chat(chat):
                raise ValueError(f"conversation {index} is {chat!r:.80}; expected {expected}")
        variables = {**(chat_template_kwargs or {}), "continue_final_message": continue_final_message}
        prompt_ids = encode_raw_prompts(conversations, self.tokenizer, **variables)
        return self._sample(prompt_ids, params, sequence_ids, on_text)

    def generate(
        self,
        prompts: str | Sequence[RawPrompt],
        params: SamplingParams | None = None,
        *,
        sequence_ids: Sequence[int] | None = None,
        on_text: OnText | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in order.

        prompts: text, which is continued as it is, without a template; lists of token ids; and lists of messages, as
        `chat` takes them. One text alone is one prompt.
        params: None: default_sampling_params(), with the tokens that the longest prompt leaves room for.
        sequence_ids: one integer per prompt that stands for it in the noise (default: its index), so that it gets the
        same completions in whichever call or rank it is sampled.
        on_text: is called with (index of the prompt, index of the sample, text) for each piece of a completion's text,
        under way; the pieces make up `Completion.text`. What it raises ends the call.
        Raises ValueError, before any work, for a prompt that is empty, too long or not of the vocabulary; and
        FloatingPointError when the model's logits are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else _listed(prompts, "prompts", "a list of prompts")
        for one in prompts:
            if isinstance(one, int) or (isinstance(one, Mapping) and "role" in one):
                kind = "list of token ids" if isinstance(one, int) else "conversation"
                raise ValueError(f"prompts is one {kind}; expected a list of prompts (wrap it: [prompt])")
        return self._sample(encode_raw_prompts(prompts, self.tokenizer), params, sequence_ids, on_text)

    @torch.no_grad()  # not inference_mode: its tensors may not take part in autograd later, and FSDP keeps some
    def _sample(
        self,
        prompt_ids: list[list[int]],
        params: SamplingParams | None,
        sequence_ids: Sequence[int] | None,
        on_text: OnText | None,
    ) -> list[list[Completion]]:
        if params is None:
            room = self.longest - max(map(len, prompt_ids), default=0)
            params = self.default_sampling_params()
            params = replace(params, max_tokens=min(params.max_tokens, max(room, 1)))
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is {params!r:.80}; expected one SamplingParams, of all prompts")
        self._check_prompts(prompt_ids, params.max_tokens)
        sequence_ids = range(len(prompt_ids)) if sequence_ids is None else sequence_ids
        if len(sequence_ids) != len(prompt_ids):
            raise ValueError(f"got {len(sequence_ids)} sequence_ids for {len(prompt_ids)} prompts; expected one each")

        config = self.model.config
        texts = Texts(params, config, self.tokenizer)
        num_total = len(prompt_ids) * params.n
        if not num_total:
            return []
        distinct = self._distinct(prompt_ids, sequence_ids, params)
        max_rows = min(self.max_num_seqs, num_total)
        graphs = self._graphs(max_rows)
        num_blocks = self._num_blocks(distinct, max_rows, params, has_graphs=graphs is not None)
        limits = Limits(num_blocks, max_rows, self.max_num_batched_tokens)
        watcher = Watcher(texts, on_text) if texts.stop or on_text is not None else None
        samples = Scheduler(
            self.model, distinct, params, sorted(texts.stop_ids), limits, graphs=graphs, watcher=watcher,
            record_experts=self.enable_return_routed_experts,
        ).run()  # fmt: skip
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.cuda.device_of(self.model.embed_tokens.weight):
                sampled = dict(samples)
        finally:
            self.model.train(was_training)
        return completions_of([sampled[index] for index in range(num_total)], params, config, self.tokenizer)

    def _distinct(
        self, prompt_ids: list[list[int]], sequence_ids: Sequence[int], params: SamplingParams
    ) -> list[SequenceGroup]:
        """A prompt given twice is computed once, and its samples enter together."""
        ids_N = torch.tensor(sequence_ids, dtype=torch.int64).repeat_interleave(params.n)
        keys = sample_keys(params.seed, ids_N, torch.arange(params.n).repeat(len(prompt_ids))).tolist()
        distinct: dict[tuple[int, ...], SequenceGroup] = {}
        for p, ids in enumerate(prompt_ids):
            prompt = distinct.setdefault(tuple(ids), SequenceGroup(ids))
            prompt.waiting += (Sample(i, keys[i], prompt) for i in range(p * params.n, (p + 1) * params.n))
        return list(distinct.values())

    def _graphs(self, max_rows: int) -> StepGraphs | None:
        """None: every step runs op by op."""
        capture = CAPTURES.get(self.model.embed_tokens.weight.device.type)
        if capture is None or self.enforce_eager or in_use() == "reference":
            return None
        return StepGraphs(max_rows, capture())

    def _num_blocks(self, prompts: list[SequenceGroup], rows: int, params: SamplingParams, *, has_graphs: bool) -> int:
        """What the rows need, as far as there is room: in the budget, and on the device beside all else that this call
        takes (needs.py). Raises OutOfRoom where there is none for one sample."""
        shared = [num_blocks_of(len(prompt.ids)) for prompt in prompts]
        own = [prompt.num_own(params.max_tokens) for prompt in prompts]
        spare = int(has_graphs)  # of padding
        needed = spare + rows * max(own) + min(rows, len(prompts)) * max(shared)
        alone = spare + max(map(sum, zip(shared, own)))
        lengths = [len(prompt.ids) for prompt in prompts]
        weight_VD, budget = self.model.embed_tokens.weight, self.kv_cache_memory_bytes
        size = BlockCache.bytes_per_block(self.model.config, weight_VD.dtype)
        most = params.max_tokens
        one = f"one completion of {most} tokens after a prompt of up to {max(lengths)} takes {alone * size:,}"
        if budget is not None and alone > budget // size:
            raise OutOfRoom(f"kv_cache_memory_bytes is {budget:,}; {one}: raise it, or lower {_LENGTH}")
        call = Call(
            rows, min(rows, len(prompts)), sum(lengths), self.max_num_batched_tokens, max(lengths) + most, most,
            has_graphs, params.min_tokens > 0, self.enable_return_routed_experts,
        )  # fmt: skip
        beside = sum(work_bytes(self.model.config, weight_VD.dtype, weight_VD.device.type, call).values())
        free, share = free_memory(weight_VD.device), self.memory_share if budget is None else 1.0
        room = needed * size if free is None else int(free * share * (1 - RESERVE)) - beside
        part = f", {share:.0%} of it beside training" if share < 1 else ""
        found = (
            f"{weight_VD.device} has {free or 0:,} free{part}, of which generation takes {beside:,} beside keys and "
            "values"
        )
        if budget is not None and min(needed, budget // size) * size > room:
            raise OutOfRoom(
                f"kv_cache_memory_bytes is {budget:,}; {found}: set it to {max(room, 0):,} or lower max_num_seqs"
            )
        if alone * size > room:
            raise OutOfRoom(f"{one} bytes; {found}: lower max_num_seqs, max_num_batched_tokens or {_LENGTH}")
        return min(needed, (room if budget is None else budget) // size)

    def _check_prompts(self, prompt_ids: list[list[int]], max_tokens: int) -> None:
        last = self.model.config.vocab_size - 1
        for index, ids in enumerate(prompt_ids):
            if not ids:
                raise ValueError(f"prompt {index} has no tokens; expected at least one (a bos token will do)")
            if (total := len(ids) + max_tokens) > self.longest:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens, with max_tokens {max_tokens} that makes {total}; "
                    f"max_model_len is {self.longest}: shorten the prompt, lower max_tokens or raise max_model_len"
                )
            self._check_longrope(index, len(ids), total)
            if min(ids) < 0 or max(ids) > last:
                found = f"token ids from {min(ids)} to {max(ids)}"
                raise ValueError(f"prompt {index} has {found}; expected 0 to {last}, the model's vocabulary")

    def _check_longrope(self, index: int, length: int, total: int) -> None:
        """All of a sequence is turned by the angles of its length: nothing may be computed before it is known."""
        for rope in self.model.config.ropes.values():
            turn = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else total
            text = f"prompt {index} has {length} tokens; past {turn} this model (longrope) turns all by other angles"
            if length <= turn < total:
                raise ValueError(f"{text}: with max_tokens that makes {total}; stay below, or begin past it")
            if max(turn, self.max_num_batched_tokens) < length:
                raise ValueError(f"{text}, so that it cannot come in parts: raise max_num_batched_tokens to {length}")


def _listed(prompts: Any, name: str, expected: str) -> list[Any]:
    """Of any iterable, but a text or a mapping, whose parts are no prompts."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(f"{name} is {prompts!r:.80}; expected {expected}")
    return list(prompts)
