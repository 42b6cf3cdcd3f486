"""vLLM in the trainer's own process, as a backend of VllmEngine: one `LLM`, which takes turns with the trainer.

    load      wake the weights' memory -> reload_weights from the gathered tensors -> drop the prefix cache -> wake the
              cache's memory
    rest      sleep(2): weights and cache leave the device; the next load brings both again

Sleeping is CUDA's. Every rank has its own. vLLM is given an architecture and no weights: the first push brings them.
Three faults of vLLM 0.32 on a CPU are stepped around below; docs/rollout.md says what they mean for a server there.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from r1fast.models.decoder import Decoder
from r1fast.models.model_config import ModelConfig
from r1fast.models.weights import to_hf_names
from r1fast.rollout.sampling import SampledTokens
from r1fast.rollout.vllm import RolloutError, whole_state
from r1fast.wording import one_line


@dataclass
class InProcess:
    """The one `LLM` of this process. Dropping it would end the trainer's process group: it is made once, for one
    architecture, and kept until `release`."""

    _kept: ClassVar["InProcess | None"] = None
    llm: Any
    key: str  # of the model and the options
    sleeps: bool
    tied: bool
    asleep: bool = False

    @classmethod
    def get(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device, **options: Any) -> "InProcess":
        """options: of `LLM`. Raises RolloutError if vLLM does not start, or runs already for another model."""
        key = json.dumps([dataclasses.asdict(config), str(dtype), options], sort_keys=True)
        if cls._kept is None:
            on_cpu = device.type == "cpu"
            # vLLM on a CPU packs a copy of the head, which no reload reaches while the head is tied.
            config = dataclasses.replace(config, tie_word_embeddings=config.tie_word_embeddings and not on_cpu)
            try:
                llm = _make_llm(config, dtype, on_cpu=on_cpu, **options)
            except (ValueError, RuntimeError) as error:
                raise RolloutError(f"vLLM does not start in this process: {one_line(error)[:500]}") from error
            cls._kept = cls(llm, key, sleeps=not on_cpu, tied=config.tie_word_embeddings)
            cls._kept.rest()
        if cls._kept.key != key:
            advice = "run the stages of each architecture by themselves (--stages), or set rollout.engine: r1fast"
            text = "vLLM runs in this process already for a model of another architecture, and can hold one only"
            raise RolloutError(f"{text}; {advice}")
        return cls._kept

    @classmethod
    def release(cls) -> None:
        """End vLLM, and with it the process group; at the interpreter's exit it would look for a group long gone."""
        if cls._kept is not None:
            cls._kept.llm.llm_engine.engine_core.shutdown()
            cls._kept = None

    def load(self, model: Decoder, *, zero_first: bool) -> None:
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        if zero_first:
            self.llm.collective_rpc("reset_weights")
        if not self.sleeps:
            self.llm.apply_model(_forget_packed_experts)
        weights = to_hf_names(whole_state(model), model.config, tied=self.tied)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM did not drop its prefix cache: requests of another caller are running in it")
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def complete(self, prompts: Sequence[list[int]], requests: Sequence[dict[str, Any]]) -> list[list[SampledTokens]]:
        from vllm import SamplingParams as VllmParams

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [VllmParams(**parameters, detokenize=False) for parameters in requests]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [[_sampled(sample) for sample in sorted(output.outputs, key=lambda x: x.index)] for output in outputs]

    def rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # the next push brings the weights again
            self.asleep = True


def _sampled(sample: Any) -> SampledTokens:
    logprobs = [found[i].logprob for found, i in zip(sample.logprobs, sample.token_ids, strict=True)]
    return SampledTokens(list(sample.token_ids), logprobs, sample.routed_experts, sample.finish_reason)


def _forget_packed_experts(vllm_model: nn.Module) -> None:
    """vLLM on a CPU packs experts when it makes their kernel, and never again: let the next load make the kernel."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for module in vllm_model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def _make_llm(config: ModelConfig, dtype: torch.dtype, *, on_cpu: bool, **options: Any) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every push
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it pins the trainer's threads
    from vllm import LLM

    if on_cpu:
        options["enforce_eager"] = True  # compiling takes longer than most runs there
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with tempfile.TemporaryDirectory() as folder:
        config.to_hf(dtype).save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=not on_cpu,
            distributed_executor_backend="external_launcher" if many else None,
            disable_log_stats=True,
            # The CPU's rotary kernel turns the strided queries and keys of MLA wrongly; torch's does not.
            compilation_config={"custom_ops": ["-rotary_embedding"]} if on_cpu and config.uses_mla else None,
            **options,
        )
