"""What a layer keeps for its backward pass, and has at work, counted by running it on fake tensors: they have shape,
dtype and device as those of a run, and no memory. What an op makes and drops inside is not seen.
"""

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from r1fast.models.attention import AttentionPlan, ForwardPass
from r1fast.models.decoder import Decoder, DecoderLayer
from r1fast.models.lora import LoraConfig, add_adapters
from r1fast.models.model_config import ModelConfig
from r1fast.models.rope import Rotary
from r1fast.models.shared_tokens import SharedTokens
from r1fast.parallel.parallelize import ActivationCheckpointing, checkpointed
from r1fast_kernels import torch_private

TRACED_TOKENS = (256, 512)


class Layer(NamedTuple):
    """Bytes: kept for the backward pass; the most at work beyond, forward and backward; at work without gradients."""

    kept: int
    working: int
    inference: int


class _Hashed:
    """A config, and that of its adapters, as a key."""

    def __init__(self, value: ModelConfig, lora: LoraConfig | None) -> None:
        self.value, self.lora, self.key = value, lora, repr((value, lora))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class _Allocations(torch_private.OperatorMode):
    """Storages that operators make, in the order in which they come (+) and go (-)."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (storage, bytes)
        self.known = WeakIdKeyDictionary({x.untyped_storage(): -1 for x in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
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


def _layer(config: _Hashed, index: int) -> nn.Module:
    if config.lora is None:
        return DecoderLayer(config.value, index)
    decoder = Decoder(config.value)
    add_adapters(decoder, config.lora)
    return decoder.layers[index]


@cache
def _traced(
    config: _Hashed, index: int, num_tokens: int, repeated: int, dtype: torch.dtype, device: str,
    kind: ActivationCheckpointing,
) -> Layer:  # fmt: skip
    """Of layer `index`, on one sequence, and another one that repeats the first tokens of it."""
    where = torch.device(device)
    every_S = torch.arange(num_tokens + repeated, device=where) % num_tokens
    shared = SharedTokens(every_S, num_tokens) if repeated else None
    ends = torch.tensor([0, num_tokens, num_tokens + repeated], dtype=torch.int32)
    plan = AttentionPlan(ends, len(every_S), where, shared)
    plan.flash = plan.flash[-1:]  # torch's own, which keeps as much: of others some know no tensors without memory
    # Where it takes no call: made here, of lengths, which tensors without memory have not.
    assert plan.padded.num_slots >= len(every_S)
    ropes = Rotary(config.value).to(device)(plan.positions_T, plan.lengths_T, dtype)
    step = ForwardPass(plan, ropes, None, None)
    with torch_private.fake_tensors(), torch.device(device):
        layer = _layer(config, index)
        for module in layer.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad))
        x_TD = torch.empty(num_tokens, config.value.hidden_size, dtype=dtype, requires_grad=True)
        weights = [*layer.parameters(), *layer.buffers(), x_TD]
        with torch.no_grad(), _Allocations(weights) as inference:
            layer(x_TD, step)
        run = checkpointed(layer, kind)
        with _Allocations(weights) as found:
            out_TD, _ = run(x_TD, step)
            kept = found.now()
            out_TD.backward(torch.empty_like(out_TD))
        most = found.most(without=[weight.grad for weight in layer.parameters()])
    return Layer(kept, most - kept, inference.most())


def layer_activations(
    config: ModelConfig, index: int, num_tokens: int, num_repeated: int, dtype: torch.dtype, device: str,
    kind: ActivationCheckpointing, lora: LoraConfig | None = None,
) -> Layer:  # fmt: skip
    """Of layer `index`. num_repeated: tokens that attention alone takes again (models/shared_tokens.py).

    All of it is linear in both: a line through two small numbers of each.
    """
    few, many = TRACED_TOKENS
    counts = [(few, 0), (many, 0)] + [(few, few)] * bool(num_repeated)
    first, more, *again = (_traced(_Hashed(config, lora), index, *count, dtype, device, kind) for count in counts)
    reach, reach_again = (num_tokens - few) / (many - few), num_repeated / few
    third = again[0] if again else first
    lines = zip(first, more, third, strict=True)
    return Layer(*(max(0, round(a + (b - a) * reach + (c - a) * reach_again)) for a, b, c in lines))
