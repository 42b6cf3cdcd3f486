"""What a stage will take of one rank's memory, phase by phase, from recipe and architecture alone (`--dry-run`).

P parameters, R ranks, b and r bytes of model.dtype and reduce_dtype, U parameters of the largest FSDP unit, V x D the head.

weights      4 P / R of what is trained, b P / R of a frozen one: the shards (parallel/parallelize.py)
gathered     b P on one rank, and wherever tokens are sampled; else b (root unit + two layers, one on its way)
gradients    4 P / R; of the unit at work b U and twice r U beside it (FSDP copies them to be reduced, and the result)
optimizer    8 P / R (AdamW) or 4 of a matrix (Muon); where it is offloaded, the part that a step has brought
activations  what layers keep for the backward pass, and the most that one has at work. Counted: one layer of each kind is
             run, forward and backward, on fake tensors of the shapes of a micro-batch, which have sizes and no memory
logits       the tiles of head.py, with the head's gradient, which is made in the forward pass; of a decode step all
cache        keys and values (rollout/engine.py), of full-length samples
graphs       what a decode step has at work, kept by the graphs' pool on CUDA

Sequences are taken to be as long as the recipe lets them be. Not counted: the process itself with its libraries, the
CUDA context (0.5 GB), what an allocator has free between tensors, and rewards.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from r1fast.models.attention import AttentionPlan, ForwardPass
from r1fast.models.cache import BlockCache, free_memory
from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.model_config import ModelConfig
from r1fast.parallel.optim import OFFLOAD_NUMEL
from r1fast.parallel.parallelize import ONE_UNIT_NUMEL, checkpointed
from r1fast.preflight_models import architecture_of, checkpoint_of
from r1fast.rollout.scheduler import num_blocks_of
from r1fast.schema import GRPOStage, Recipe, RewardModelStage
from r1fast.schema_options import EvalOptions, FitOptions, SampleOptions, StageBase, TrainOptions
from r1fast_kernels import head, torch_private

TERMS = ("weights", "gathered", "gradients", "optimizer", "activations", "logits", "cache", "graphs")


@dataclass
class Phase:
    """The moment of a phase that needs most: bytes by term."""

    name: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass
class Estimate:
    """Of one stage on one rank. tokens_per_step: that all ranks learn from, at most; 0: the stage does not train."""

    stage: str
    tokens_per_step: int = 0
    phases: list[Phase] = field(default_factory=list)


class Layer(NamedTuple):
    """Bytes: kept for the backward pass; the most at work beyond, forward and backward; at work without gradients."""

    kept: int
    working: int
    inference: int


class _Allocations(torch_private.TorchDispatchMode):
    """Storages that operators make, in the order in which they come (+) and go (-)."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (storage, bytes)
        self.known = WeakIdKeyDictionary({x.untyped_storage(): -1 for x in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                number = self.known[storage] = len(self.events)
                size = storage.nbytes()
                self.events.append((number, size))
                weakref.finalize(storage, self.events.append, (number, -size))
        return out

    def most(self, without: Sequence[Tensor | None] = ()) -> int:
        """The most bytes that there were at a time, but for these tensors."""
        left_out = {self.known[x.untyped_storage()] for x in without if x is not None}
        now = most = 0
        for number, size in self.events:
            now += 0 if number in left_out else size
            most = max(most, now)
        return most

    def now(self) -> int:
        return sum(size for _, size in self.events)


@cache
def layer_activations(
    config: ModelConfig, index: int, lengths: tuple[int, ...], dtype: torch.dtype, device: str, checkpointing: Any
) -> Layer:
    """Of layer `index`, on packed sequences of these lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    num_tokens = int(ends[-1])
    with torch.device("meta"):
        rotary = Decoder(config).rotary
    rotary = type(rotary)(config)
    plan = AttentionPlan(ends.int(), num_tokens, torch.device("cpu"))
    ropes = rotary(plan.positions_T, plan.lengths_T, dtype)
    step = ForwardPass(plan, ropes, None, None, None)
    with torch_private.fake_tensors(), torch.device(device):
        layer = DecoderLayer(config, index).to(dtype)
        x_TD = torch.empty(num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        weights = [*layer.parameters(), *layer.buffers(), x_TD]
        with torch.no_grad(), _Allocations(weights) as inference:
            layer(x_TD, step)
        layer = checkpointed(layer, checkpointing)
        with _Allocations(weights) as found:
            out_TD, _ = layer(x_TD, step)
            kept = found.now()
            out_TD.backward(torch.empty_like(out_TD))
        most = found.most(without=[weight.grad for weight in layer.parameters()])
    return Layer(kept, most - kept, inference.most())
