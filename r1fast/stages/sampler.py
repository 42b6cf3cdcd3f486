"""Sampling from the model of a stage, by our engine or vLLM: rows in, samples out, the same on every rank."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from r1fast.config import ConfigError
from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.models.decoder import Decoder
from r1fast.models.lora import add_product, factors_of, merged
from r1fast.parallel.mesh import Dist
from r1fast.parallel.parallelize import copy_weights, generation_phase, whole_tensor
from r1fast.rollout.engine import OutOfRoom, RolloutEngine
from r1fast.rollout.needs import BACKGROUND_SHARE
from r1fast.rollout.sampling import Completion, SamplingParams, completion_text
from r1fast.rollout.vllm import Backend, RolloutError, VllmEngine
from r1fast.rollout.vllm_process import InProcess
from r1fast.rollout.vllm_server import Client, Server
from r1fast.schema_options import GenerateOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.packed import Prompt, encode_prompts, prompt_length_problems
from r1fast.stopping import Interrupted, Stopped

WEIGHTS = "rollout_weights"  # folder of the run directory, written anew at every push to a server
# By index of the prompt; or why there are none (vLLM gave no answer, logits that are not finite, no memory for the
# cache); or the signal that ended it.
Share = dict[int, list[Completion]] | RolloutError | FloatingPointError | OutOfRoom | int


class GenerationFailed(ConfigError):
    """vLLM gave no completions, raised on every rank; the model is as it was, so what was done before can be saved."""


@dataclass(slots=True)
class Sample:
    """One completion of one row, and what became of it."""

    row: dict
    group: int  # which prompt of the call
    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_logprobs: list[float]
    finish_reason: str
    text: str
    prefilled: bool  # the prompt opened the reasoning
    asked_format: str = ""  # in which it was to be, where that is not the one it is judged in
    routed_experts: np.ndarray | None = None  # of every token but the last: [., L, K]
    rewards: dict[str, float] = field(default_factory=dict)  # by name; nan = does not apply
    failed_rewards: Sequence[str] = ()  # whose call failed: without a value, or 0 where the completion was at fault
    reward: float = float("nan")  # weighted sum; nan = unscorable
    advantage: float = 0.0


class SamplingCall(NamedTuple):
    """What to sample: a prompt and an integer that stands for it in the noise for each row."""

    rows: Sequence[dict]
    prompts: Sequence[Prompt]
    sequence_ids: Sequence[int]
    params: SamplingParams


class Sampler:
    """Generates from a sharded model, each rank its share of the prompts."""

    def __init__(
        self, ctx: StageContext[GenerateOptions], model: Decoder, tokenizer: Tokenizer, *, record: bool = False
    ) -> None:
        """record: samples of a mixture of experts say which experts each token went to."""
        self.ctx, self.model, self.tokenizer = ctx, model, tokenizer
        self.engine = build_engine(ctx, model, tokenizer, record=record)

    def encode(self, rows: Sequence[dict]) -> list[Prompt]:
        prompts = encode_prompts(rows, self.tokenizer, self.ctx.stage)
        positions = self.model.config.max_position_embeddings
        for problem in prompt_length_problems([ids for ids, _ in prompts], rows, self.ctx.stage, positions):
            raise self.ctx.error(problem)
        return prompts

    def generate(
        self, rows: Sequence[dict], *, n: int, temperature: float, seed: int, top_p: float = 1.0,
        sequence_ids: Sequence[int] | None = None, prompts: Sequence[Prompt] | None = None,
    ) -> list[Sample]:  # fmt: skip
        """n samples of every row, group-contiguous, on every rank.

        Row i draws its noise from (seed, sequence_ids[i]), by default (seed, i).
        """
        most = self.ctx.stage.max_completion_length
        params = SamplingParams(n=n, max_tokens=most, temperature=temperature, top_p=top_p, seed=seed)
        prompts = self.encode(rows) if prompts is None else prompts
        return self.start(SamplingCall(rows, prompts, sequence_ids or range(len(rows)), params))()

    def start(self, call: SamplingCall) -> Callable[[], list[Sample]]:
        """A function that returns the samples; here it is what makes them, too."""

        def finish() -> list[Sample]:
            with self.ctx.phase("generate"), generation_phase(self.model), merged(self.model):
                mine = self.run(call)
            return self.gather(call, mine)

        return finish

    def run(self, call: SamplingCall) -> Share:
        """This rank's share of the prompts; no collective."""
        mine = share_of(self.engine, len(call.rows), self.ctx.dist)
        try:
            with self.ctx.stop.interruptible():
                outputs = self.engine.generate(
                    [call.prompts[i].ids for i in mine], call.params, sequence_ids=[call.sequence_ids[i] for i in mine]
                )
        except (RolloutError, FloatingPointError, OutOfRoom) as error:
            return error  # `gather` raises: the other ranks would wait for this one
        except Interrupted:
            return self.ctx.stop.asked
        return dict(zip(mine, outputs, strict=True))

    def gather(self, call: SamplingCall, mine: Share) -> list[Sample]:
        merged: dict[int, list[Completion]] = {}
        shares = self.ctx.dist.all_gather_objects(mine)
        for share in sorted(shares, key=lambda share: not isinstance(share, int)):  # a signal before what failed
            if isinstance(share, int):
                raise Stopped(share)
            if isinstance(share, RolloutError):
                raise GenerationFailed(f"stages.{self.ctx.stage.name}: {share}")
            if isinstance(share, FloatingPointError | OutOfRoom):
                raise self.ctx.error(str(share))
            merged |= share
        samples = []
        for i, (row, (ids, prefilled)) in enumerate(zip(call.rows, call.prompts, strict=True)):
            for found in merged[i]:
                made = (found.token_ids, found.logprobs, found.finish_reason, found.text)
                samples.append(Sample(row, i, ids, *made, prefilled, routed_experts=found.routed_experts))
        return samples

    def text_of(self, completion_ids: Sequence[int]) -> str:
        """The text that the engine would give these tokens, had it sampled them at once."""
        return completion_text(completion_ids, self.model.config, self.tokenizer)


class BackgroundSampler(Sampler):
    """Sampling in a thread while the policy is trained (`rollout.async_steps: 1`).

    main thread   | reward .. update 0 |w| reward .. update 1 |w| ...     w: the weights are copied
    the thread    | sample 1           | | sample 2           | |

    What step n + 1 learns from is sampled with the weights that step n began with. The trainer's tensors change under
    way, so the thread reads a copy, whole on every rank: the bytes of the model in the compute dtype, for as long as
    the stage trains, and one gather of all weights a step. The thread takes part in no collective: ranks would meet in
    another order. On a GPU it has a stream of its own.
    """

    def __init__(self, ctx: StageContext[GenerateOptions], policy: Decoder, tokenizer: Tokenizer) -> None:
        with torch.device("meta"):
            model = Decoder(policy.config)
        # Nothing is read: what it samples with is copied before each rollout.
        model = model.to(ctx.param_dtype).to_empty(device=ctx.dist.device).eval().requires_grad_(False)
        model.head.in_fp32 = policy.head.in_fp32
        super().__init__(ctx, model, tokenizer, record=True)
        if isinstance(self.engine, RolloutEngine):
            self.engine.memory_share = BACKGROUND_SHARE
        self.policy = policy
        self.stream = torch.cuda.Stream(ctx.dist.device) if ctx.dist.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")

    def start(self, call: SamplingCall) -> Callable[[], list[Sample]]:
        with self.ctx.phase("generate"):
            copy_weights(self.policy, self.model)
            weights = dict(self.model.named_parameters())
            for name, factors in factors_of(self.policy, whole_tensor).items():
                add_product(weights[name], *factors)
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream())
        future = self.thread.submit(self.run, call)

        def finish() -> list[Sample]:
            with self.ctx.phase("generate"):  # what of it the training did not hide
                return self.gather(call, future.result())

        return finish

    def run(self, call: SamplingCall) -> Share:
        with torch.cuda.stream(self.stream):  # None: nothing. A new thread has neither the stream nor the device
            return super().run(call)


def by_group(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return list(groups.values())


def summary_of(text: str, response_format: str, prefilled: bool = False) -> str:
    """The part of a response that the user reads: what follows the reasoning."""
    return RESPONSE_FORMATS[response_format].parse(text, prefilled=prefilled).answer or ""


def build_engine(
    ctx: StageContext, model: Decoder, tokenizer: Tokenizer, *, record: bool
) -> RolloutEngine | VllmEngine:
    """record: completions of a mixture of experts say which experts each token went to (vLLM's: for router_replay)."""
    rollout = ctx.recipe.rollout
    if rollout.engine == "r1fast":
        own = rollout.model_dump(exclude={"engine", "async_steps", "vllm"})
        routed = record and any(True for _ in model.moe_layers())
        return RolloutEngine(model, tokenizer, enable_return_routed_experts=routed, **own)
    try:
        backend = vllm_backend(ctx, model)
    except RolloutError as error:
        raise ctx.error(str(error)) from error
    return VllmEngine(model, tokenizer, backend, routed_experts=record and ctx.stage.router_replay)


def vllm_backend(ctx: StageContext, model: Decoder) -> Backend:
    rollout, options = ctx.recipe.rollout, ctx.recipe.rollout.vllm
    if (url := options.server_base_url) is not None:
        client = Client(url, timeout_s=options.server_timeout, request_timeout_s=options.request_timeout)
        folder = ctx.run_dir / WEIGHTS if options.weight_transfer == "folder" else None
        return Server(client, folder=folder, max_num_seqs=rollout.max_num_seqs)
    ctx.dist.before_close.callback(InProcess.release)
    return InProcess.get(
        model.config, ctx.param_dtype, ctx.dist.device, max_num_seqs=rollout.max_num_seqs,
        max_model_len=options.max_model_length, gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        enable_return_routed_experts=any(getattr(stage, "router_replay", False) for stage in ctx.recipe.stages),
    )  # fmt: skip


def share_of(engine: RolloutEngine | VllmEngine, num_rows: int, dist: Dist) -> range:
    """This rank's rows; where one server samples for every rank, rank 0 alone talks to it."""
    if isinstance(engine, VllmEngine) and isinstance(engine.backend, Server):
        return range(num_rows if dist.is_main else 0)
    return range(dist.rank, num_rows, dist.world_size)
