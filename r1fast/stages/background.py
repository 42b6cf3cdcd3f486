"""Sampling in a thread while the policy is trained (`rollout.async_steps: 1`).

    main thread   | reward .. update 0 |w| reward .. update 1 |w| ...     w: the weights are copied
    the thread    | sample 1           | | sample 2           | |

What step n + 1 learns from is sampled with the weights that step n began with. The trainer's tensors change under way,
so the thread reads a copy, whole on every rank: the bytes of the model in the compute dtype, for as long as the stage
trains, and one gather of all weights a step. The thread takes part in no collective: ranks would meet in another order.
On a GPU it has a stream of its own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from r1fast.models.decoder import Decoder
from r1fast.models.weights import load_model
from r1fast.parallel.parallelize import copy_weights
from r1fast.schema_options import GenerateOptions
from r1fast.stages.context import StageContext, Tokenizer
from r1fast.stages.sampler import Sample, Sampler, SamplingCall, Share


class BackgroundSampler(Sampler):
    """A Sampler whose `start` copies the policy and samples from the copy in a thread."""

    def __init__(self, ctx: StageContext[GenerateOptions], policy: Decoder, tokenizer: Tokenizer) -> None:
        model, _ = load_model(ctx.model_path(ctx.model_ref), dtype=ctx.param_dtype, device=ctx.dist.device)
        model.requires_grad_(False)
        model.head.in_fp32 = policy.head.in_fp32
        super().__init__(ctx, model, tokenizer, record=True)
        self.policy = policy
        self.stream = torch.cuda.Stream(ctx.dist.device) if ctx.dist.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")

    def start(self, call: SamplingCall) -> Callable[[], list[Sample]]:
        with self.ctx.phase("generate"):
            copy_weights(self.policy, self.model)
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
