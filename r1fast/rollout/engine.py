"""Generation with the trainer's own weights.

Samples are decoded in waves of at most `max_num_seqs` rows; one row is one sample of one prompt:

    prefill   p0 p1 p2            the distinct prompts of the wave, packed; logits of the last positions only
    fan out   p0 p0 p1 p1 p2 p2   each cache row copied to the samples of its prompt
    decode    o  o  x  o  x  o    one token per row and step; x = stopped, decoded on without effect
    compact   o  o  o  o          stopped rows leave the cache when they are more than a quarter of the rows

A step has no Python loop over rows and one host read (none but every eighth step on a GPU): tokens and log-probs stay
in [N, max_tokens] tensors, and the stop token alone says where a completion ends.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r1fast.models.cache import KVCache
from r1fast.models.decoder import Decoder
from r1fast.rollout.sampling import Completion, SamplingParams, fold_in, sample_keys
from r1fast_kernels import sample_tokens, selective_logprobs

COMPACT_ABOVE = 0.25  # share of stopped rows; lower copies the cache more often, higher decodes more dead rows
SYNC_STEPS = {"cpu": 1}  # steps between looks at the stop flags
DEVICE_SYNC_STEPS = 8  # elsewhere: each look waits for the device

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]
_Sampled = tuple[list[int], list[float], np.ndarray | None]  # tokens, log-probs, experts of the inputs [., L, K]


@dataclass
class _Rows:
    """The rows being decoded, all tensors of one length; compaction drops rows from each."""

    cache: KVCache
    output_rows_B: Tensor  # where each row's tokens go in the wave's output
    keys_B: Tensor  # noise stream
    positions_B: Tensor  # position in the sequence of the token sampled next
    stopped_B: Tensor

    def keep(self, index_B: Tensor) -> "_Rows":
        return _Rows(
            cache=self.cache.select(index_B),
            output_rows_B=self.output_rows_B[index_B],
            keys_B=self.keys_B[index_B],
            positions_B=self.positions_B[index_B],
            stopped_B=self.stopped_B[index_B],
        )


@dataclass
class _Wave:
    """What a wave has sampled: meaningful up to each row's first stop token."""

    ids_NS: Tensor  # int64 [N, max_tokens]
    logprobs_NS: Tensor  # fp32
    routed_NSLK: Tensor | None = None  # int16, the experts of token s where it was an input

    def record(self, rows_B: Tensor, step: int, expert_ids_BLK: Tensor) -> None:
        if self.routed_NSLK is None:
            self.routed_NSLK = expert_ids_BLK.new_zeros(
                *self.ids_NS.shape, *expert_ids_BLK.shape[1:], dtype=torch.int16
            )
        self.routed_NSLK[rows_B, step] = expert_ids_BLK.to(torch.int16)

    def cut(self, stop_ids: list[int], routed_prompts: list[np.ndarray]) -> Iterator[_Sampled]:
        """Each row's tokens and log-probs up to and with its first stop token, and its experts of all but the last."""
        num_rows, max_tokens = self.ids_NS.shape
        stop_ids_X = torch.tensor(stop_ids, dtype=torch.int64, device=self.ids_NS.device)
        is_stop_NS = torch.isin(self.ids_NS, stop_ids_X)
        lengths_N = torch.where(is_stop_NS.any(1), is_stop_NS.int().argmax(1) + 1, max_tokens)
        routed_NSLK = None if self.routed_NSLK is None else self.routed_NSLK.cpu().numpy()
        columns = self.ids_NS.tolist(), self.logprobs_NS.tolist(), lengths_N.tolist(), range(num_rows)
        for ids, logprobs, length, n in zip(*columns):
            routed = routed_prompts[n] if routed_prompts else None
            if routed is not None and routed_NSLK is not None:
                routed = np.concatenate([routed, routed_NSLK[n, : length - 1]])
            yield ids[:length], logprobs[:length], routed


class RolloutEngine:
    """Samples completions from `model`, a Decoder whose parameters are plain tensors while `generate` runs.

    tokenizer: encodes string prompts and decodes texts; None if prompts are token ids and texts are not needed.
    max_num_seqs: rows decoded at the same time; a step reads the weights once for all of them, so decode wide.
    max_model_len: longest prompt + completion in tokens; default: the model's max_position_embeddings.
    impl: which implementation its ops run ("reference", "cpp", "triton"); default: the best on the device.
    enable_return_routed_experts: completions say which experts each token went to, for an update to replay them.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        impl: str | None = None,
        enable_return_routed_experts: bool = False,
    ) -> None:
        if model.scalar_head:
            raise ValueError("the model is a reward model (a `score` head); expected a language model")
        limit = model.config.max_position_embeddings
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {max_num_seqs}; expected at least 1 row")
        if max_model_len is not None and not 1 < max_model_len <= limit:
            raise ValueError(
                f"max_model_len is {max_model_len}; expected 2 to {limit}, the model's max_position_embeddings"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or limit
        self.impl = impl
        if enable_return_routed_experts and not any(True for _ in model.moe_layers()):
            raise ValueError("enable_return_routed_experts: the model has no mixture-of-experts layer")
        self.enable_return_routed_experts = enable_return_routed_experts

    @torch.no_grad()  # not inference_mode: its tensors may not take part in autograd later, and FSDP keeps some
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        sequence_ids: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in order.

        prompts: strings (encoded as the tokenizer does by default) or lists of token ids. sequence_ids: one integer
        per prompt that stands for it in the noise (default: its index), so that a prompt gets the same completions in
        whichever call or rank it is sampled. on_progress(num_finished, num_total) counts completions.
        Raises ValueError, before any work, for a prompt that is empty, too long or not of the vocabulary.
        """
        prompt_ids = self._encode(prompts)
        self._check_prompts(prompt_ids, params)
        if sequence_ids is None:
            sequence_ids = range(len(prompt_ids))
        if len(sequence_ids) != len(prompt_ids):
            raise ValueError(f"got {len(sequence_ids)} sequence_ids for {len(prompt_ids)} prompts; expected one each")

        num_total = len(prompt_ids) * params.n
        stop_ids = self._stop_ids(params)
        was_training = self.model.training
        self.model.eval()
        sampled: list[_Sampled] = []
        try:
            for samples in _waves(num_total, params.n, self.max_num_seqs):
                finished = _Counter(on_progress, samples.start, num_total)
                rows, logits_BV, routed_prompts = self._prefill(samples, prompt_ids, sequence_ids, params)
                wave = self._decode(rows, logits_BV, params, stop_ids, finished)
                sampled += wave.cut(stop_ids, routed_prompts)
        finally:
            self.model.train(was_training)

        flat = self._completions(sampled, stop_ids)
        return [flat[start : start + params.n] for start in range(0, num_total, params.n)]

    def _prefill(
        self, samples: range, prompt_ids: list[list[int]], sequence_ids: Sequence[int], params: SamplingParams
    ) -> tuple[_Rows, Tensor, list[np.ndarray]]:
        """Run the wave's distinct prompts once, packed.

        Returns one row per sample, the logits of its next token, and the experts of its prompt [P, L, K] if recorded.
        """
        weight_VD = self.model.embed_tokens.weight
        device = weight_VD.device
        prompt_of_row = [sample // params.n for sample in samples]
        prefill_rows: dict[tuple[int, ...], int] = {}  # a prompt given twice is computed once
        row_of_prompt = {
            p: prefill_rows.setdefault(tuple(prompt_ids[p]), len(prefill_rows)) for p in sorted(set(prompt_of_row))
        }
        fan_out_B = torch.tensor([row_of_prompt[p] for p in prompt_of_row], device=device)

        lengths_P = torch.tensor([len(ids) for ids in prefill_rows])
        cu_seqlens = torch.nn.functional.pad(lengths_P.cumsum(0), (1, 0)).to(device, torch.int32)
        input_ids_T = torch.tensor([i for ids in prefill_rows for i in ids], device=device)
        cache = KVCache(
            self.model.config,
            num_rows=len(prefill_rows),
            max_len=int(lengths_P.max()) + params.max_tokens,
            dtype=weight_VD.dtype,
            device=device,
        )
        last_P = cu_seqlens[1:].long() - 1
        logits_PV = self.model(
            input_ids_T, cu_seqlens, cache=cache, head=lambda hidden_TD, weight_VD: hidden_TD[last_P] @ weight_VD.T
        )
        rows = _Rows(
            cache=cache.select(fan_out_B),
            output_rows_B=torch.arange(len(samples), device=device),
            keys_B=sample_keys(
                params.seed,
                torch.tensor([sequence_ids[p] for p in prompt_of_row], device=device),
                torch.tensor([sample % params.n for sample in samples], device=device),
            ),
            positions_B=lengths_P.to(device)[fan_out_B],
            stopped_B=torch.zeros(len(samples), dtype=torch.bool, device=device),
        )
        routed_prompts: list[np.ndarray] = []
        if self.enable_return_routed_experts:
            parts = np.split(
                self.model.last_expert_ids().to(torch.int16).cpu().numpy(), lengths_P.cumsum(0)[:-1].numpy()
            )
            routed_prompts = [parts[row_of_prompt[p]] for p in prompt_of_row]
        return rows, logits_PV[fan_out_B], routed_prompts

    def _decode(
        self, rows: _Rows, logits_BV: Tensor, params: SamplingParams, stop_ids: list[int], finished: "_Counter"
    ) -> "_Wave":
        """The step loop."""
        device = logits_BV.device
        sync_steps = SYNC_STEPS.get(device.type, DEVICE_SYNC_STEPS)
        num_rows = logits_BV.shape[0]
        stop_ids_X = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        is_stop_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=device).index_fill_(0, stop_ids_X, True)
        wave = _Wave(
            torch.zeros(num_rows, params.max_tokens, dtype=torch.int64, device=device),
            torch.zeros(num_rows, params.max_tokens, device=device),
        )

        for step in range(params.max_tokens):
            banned_X = stop_ids_X if step < params.min_tokens else None
            ids_B, logprobs_B = _sample(logits_BV, params, fold_in(rows.keys_B, rows.positions_B), banned_X, self.impl)
            wave.ids_NS[rows.output_rows_B, step] = ids_B
            wave.logprobs_NS[rows.output_rows_B, step] = logprobs_B
            rows.stopped_B |= is_stop_V[ids_B]

            if step + 1 == params.max_tokens:
                break
            if (step + 1) % sync_steps == 0:
                num_stopped = int(rows.stopped_B.sum())
                finished.report(num_rows - len(ids_B) + num_stopped)
                if num_stopped == len(ids_B):
                    break
                if num_stopped > COMPACT_ABOVE * len(ids_B):
                    index_B = (~rows.stopped_B).nonzero().squeeze(1)
                    rows, ids_B = rows.keep(index_B), ids_B[index_B]
            logits_BV = self.model.decode(ids_B, rows.positions_B, rows.cache)
            rows.positions_B += 1
            if self.enable_return_routed_experts:
                wave.record(rows.output_rows_B, step, self.model.last_expert_ids())
        finished.report(num_rows)
        return wave

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; expected a list of prompts (wrap it: [prompt])")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [list(prompt) for prompt in prompts]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ValueError("got string prompts but no tokenizer; give RolloutEngine one, or prompts as token ids")
        encoded = iter(self.tokenizer(texts)["input_ids"])
        return [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]

    def _check_prompts(self, prompt_ids: list[list[int]], params: SamplingParams) -> None:
        vocab_size = self.model.config.vocab_size
        for index, ids in enumerate(prompt_ids):
            if not ids:
                raise ValueError(f"prompt {index} has no tokens; expected at least one (a bos token will do)")
            if len(ids) + params.max_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens, with max_tokens {params.max_tokens} that makes "
                    f"{len(ids) + params.max_tokens}; max_model_len is {self.max_model_len}: shorten the prompt, "
                    "lower max_tokens or raise max_model_len"
                )
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(
                    f"prompt {index} has token ids from {min(ids)} to {max(ids)}; expected 0 to {vocab_size - 1}, "
                    "the model's vocabulary"
                )

    def _eos_ids(self) -> set[int]:
        """End-of-sequence tokens of the model's configuration (one or several) and of the tokenizer."""
        eos = self.model.config.eos_token_id
        eos_ids = [*eos] if isinstance(eos, (list, tuple)) else [eos]
        if self.tokenizer is not None:
            eos_ids.append(self.tokenizer.eos_token_id)
        return {i for i in eos_ids if i is not None}

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        stop_ids = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self._eos_ids())
        vocab_size = self.model.config.vocab_size
        if params.stop_token_ids and max(params.stop_token_ids) >= vocab_size:
            raise ValueError(
                f"stop_token_ids has {max(params.stop_token_ids)}; expected ids below {vocab_size}, the vocabulary size"
            )
        return sorted(i for i in stop_ids if i < vocab_size)

    def _completions(self, sampled: list[_Sampled], stop_ids: list[int]) -> list[Completion]:
        stops = set(stop_ids)
        stopped = [ids[-1] in stops for ids, _, _ in sampled]
        texts = self._texts([ids[:-1] if end else ids for (ids, _, _), end in zip(sampled, stopped)])
        return [
            Completion(text, ids, logprobs, "stop" if end else "length", routed)
            for text, (ids, logprobs, routed), end in zip(texts, sampled, stopped)
        ]

    def _texts(self, ids: list[list[int]]) -> list[str]:
        if self.tokenizer is None:
            return [""] * len(ids)
        # Not skip_special_tokens: tags such as <think> are special tokens in some vocabularies, and rewards read them.
        dropped = self._eos_ids() | {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        shown = [[i for i in row if i not in dropped] for row in ids]
        return self.tokenizer.batch_decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Counter:
    """Calls on_progress(num_finished, num_total) whenever the number of finished samples has grown."""

    def __init__(self, on_progress: Progress | None, num_before: int, num_total: int) -> None:
        self.on_progress, self.num_before, self.num_total = on_progress, num_before, num_total
        self.num_reported = 0

    def report(self, num_finished: int) -> None:
        if self.on_progress is not None and num_finished > self.num_reported:
            self.on_progress(self.num_before + num_finished, self.num_total)
        self.num_reported = num_finished


def _waves(num_samples: int, n: int, max_num_seqs: int) -> Iterator[range]:
    """Cut the samples, prompt by prompt, into waves of whole groups (one prefill each), or of rows if none fits."""
    wave_size = max_num_seqs // n * n or max_num_seqs
    for start in range(0, num_samples, wave_size):
        yield range(start, min(start + wave_size, num_samples))


def _sample(
    logits_BV: Tensor, params: SamplingParams, seeds_B: Tensor, banned_X: Tensor | None, impl: str | None
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob in the untruncated tempered distribution; banned_X are never drawn."""
    draw = partial(
        sample_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seeds_B=seeds_B,
        impl=impl,
    )
    if banned_X is None or not len(banned_X):
        return draw(logits_BV)
    ids_B, _ = draw(logits_BV.index_fill(1, banned_X, -torch.inf))
    # The trainer knows nothing of the ban: its log-prob, and so the ratio, is that of the distribution without it.
    logprobs_B = selective_logprobs(logits_BV, ids_B, temperature=params.temperature or 1.0, impl=impl)
    return ids_B, cast(Tensor, logprobs_B)
