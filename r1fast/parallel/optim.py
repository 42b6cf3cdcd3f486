"""AdamW and Muon on FSDP shards, and learning-rate schedules.

One torch optimizer covers both: its parameter groups say which algorithm applies. Steps run on the local shards, not
through DTensor dispatch (MLA + MoE of 3 layers, D 64, one rank: 0.6 ms per AdamW step against 1.0 ms), while the state
is kept as DTensors, so that torch.distributed.checkpoint can save it on one number of ranks and load it on another.

Muon (Jordan et al. 2024): the Nesterov momentum of a matrix is replaced by its nearest orthogonal matrix, computed
by five quintic Newton-Schulz steps. Scale 0.2 * sqrt(max(rows, cols)) (Liu et al. 2025, arXiv 2502.16982): the update
then has the root mean square of AdamW's, and one learning rate and weight decay serve both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from r1fast.parallel.offload import Offloaded
from r1fast.parallel.parallelize import local_tensor, reshard
from r1fast_kernels import torch_private

_STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
LR_SCHEDULES = ("constant", "linear", "cosine", "wsd")
# Lookup tables and outputs have no "matrix" geometry, and the router is small and sensitive: AdamW.
_NEVER_MUON = frozenset({"embed_tokens", "lm_head", "score", "gate"})
# Offloaded state comes, and Muon gathers, for so many weights at a time, or those of one larger parameter.
PART_NUMEL = 64 << 20
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class ShardOptimizer(torch.optim.Optimizer):
    """AdamW (fused) and Muon over parameter groups with an "algorithm" key; made by build_optimizer.

    offload: the state is in host memory, and comes for the part of a step that needs it, or inside `here`.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], defaults: dict[str, Any], offload: bool = False
    ) -> None:
        super().__init__(groups, defaults)
        self._model = model
        self._away: dict[nn.Parameter, Offloaded] = {}
        # Created now and not at the first step: a checkpoint taken or loaded at any time has the same keys.
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {name: torch.zeros_like(param.detach()) for name in _STATE[group["algorithm"]]}
                if group["algorithm"] == "adamw":
                    self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                if offload:
                    self._away[param] = Offloaded(self.state[param][name] for name in _STATE[group["algorithm"]])

    def set_lr(self, multiplier: float) -> None:
        """Learning rate of the next step = learning_rate * multiplier (see lr_at)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gathered weights are dropped, so none can be stale."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if group["algorithm"] == "muon":
                self._step_muon(group, params)
                continue
            for part in _parts(params) if self._away else [params] if params else []:
                with self.here(part):
                    self._step_adamw(group, part)
        reshard(self._model)

    @contextmanager
    def here(self, params: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Inside, the state of these parameters (None: of all) is on their device, as without offload it always is."""
        with ExitStack() as held:
            for param in self._away if params is None else params if self._away else ():
                held.enter_context(self._away[param].here())
            yield

    def _step_adamw(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        weights, (beta1, beta2) = [local_tensor(param) for param in params], group["betas"]
        grads = [local_tensor(param.grad) for param in params]  # type: ignore[arg-type]
        means, squares = ([local_tensor(self.state[param][name]) for param in params] for name in _STATE["adamw"])
        steps = [self.state[param]["step"] for param in params]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        # fused: one fixed implementation, as fused and foreach differ in the last bits.
        flags = {"fused": True, "amsgrad": False, "maximize": False}
        adamw(weights, grads, means, squares, [], steps, beta1=beta1, beta2=beta2, **settings, **flags)  # type: ignore[arg-type]
        # The fused kernel does not count as an in-place update; generation_phase relies on the count.
        torch.autograd.graph.increment_version(weights)

    def _step_muon(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for part in _parts(params):
            weights = [local_tensor(param) for param in part]
            grads = [local_tensor(param.grad) for param in part]  # type: ignore[arg-type]
            with self.here(part):
                buffers = [local_tensor(self.state[param]["momentum_buffer"]) for param in part]
                torch_private.foreach_lerp_(buffers, grads, 1.0 - momentum)
                updates = torch_private.foreach_lerp(grads, buffers, momentum)  # Nesterov
            torch_private.foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
            torch_private.foreach_add_(weights, _muon_directions(list(updates), part), alpha=-lr)


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    offload: bool = False,
) -> ShardOptimizer:
    """The optimizer of a parallelized model's trainable parameters. Weight decay is decoupled and spares vectors.

    name "muon": matrices of the blocks (also stacked [E, rows, cols] experts) by Muon with `momentum`; embedding,
    heads, norms, biases and router by AdamW, as all parameters by name "adamw". offload: as of ShardOptimizer.
    """
    if name not in _STATE:
        raise ValueError(f"unknown optimizer {name!r}; expected one of {', '.join(_STATE)}")
    reshard(model)  # while gathered, parameters() are other objects than those that get the gradients
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for path, param in model.named_parameters():
        if param.requires_grad:
            is_matrix = param.ndim in (2, 3) and _NEVER_MUON.isdisjoint(path.split("."))
            algorithm = "muon" if name == "muon" and is_matrix else "adamw"
            groups[algorithm, param.ndim > 1].append(param)
    if not groups:
        raise ValueError(f"build_optimizer got a {type(model).__name__} without trainable parameters")
    settings = {"lr": learning_rate, "initial_lr": learning_rate, "betas": betas, "eps": eps, "momentum": momentum}
    param_groups = [
        {"params": params, "algorithm": algorithm, "weight_decay": weight_decay if decays else 0.0}
        for (algorithm, decays), params in groups.items()
    ]
    return ShardOptimizer(model, param_groups, settings, offload)


def _parts(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """PART_NUMEL numbers at most, or one parameter."""
    part: list[nn.Parameter] = []
    for param in params:
        if part and sum(x.numel() for x in (*part, param)) > PART_NUMEL:
            yield part
            part = []
        part.append(param)
    if part:
        yield part


def _muon_directions(shards: list[torch.Tensor], params: list[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shards of the orthogonalised updates, scaled, from its shards of the updates."""
    matrices = _gather_rows(shards, params)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (rows, cols) in enumerate(x.shape[-2:] for x in matrices):
        buckets[min(rows, cols), max(rows, cols)].append(i)
    for (low, high), bucket in buckets.items():  # matrices of one shape, and of its transpose, in one batched call
        stacks = [matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in bucket]
        wide = torch.cat([x if x.shape[1:] == (low, high) else x.mT for x in stacks])
        found = newton_schulz(wide).mul_(0.2 * math.sqrt(high)).split([len(x) for x in stacks])
        for i, stack, direction in zip(bucket, stacks, found, strict=True):
            matrices[i] = (direction if stack.shape[1:] == (low, high) else direction.mT).reshape(matrices[i].shape)
    return [_own_rows(x, param) for x, param in zip(matrices, params, strict=True)]


def _rows_are_apart(param: nn.Parameter) -> bool:
    """Of one matrix. On one rank, or where experts are sharded along E, every matrix is whole where it is."""
    return isinstance(param, DTensor) and param.device_mesh.size() > 1 and param.ndim == 2


def _gather_rows(shards: list[torch.Tensor], params: list[nn.Parameter]) -> list[torch.Tensor]:
    """Whole matrices, after one gather of all whose rows are apart."""
    found, apart = list(shards), [i for i, param in enumerate(params) if _rows_are_apart(param)]
    if not apart:
        return found
    mesh = cast(DTensor, params[apart[0]]).device_mesh
    sizes = [-(-params[i].shape[0] // mesh.size()) * params[i].shape[1] for i in apart]  # the last ranks may have less
    mine = shards[0].new_zeros(sum(sizes))
    for i, place in zip(apart, mine.split(sizes), strict=True):
        place[: shards[i].numel()] = shards[i].flatten()
    everyone = mine.new_empty(mesh.size() * len(mine))
    torch_dist.all_gather_into_tensor(everyone, mine, group=mesh.get_group())
    for i, place in zip(apart, everyone.view(mesh.size(), -1).split(sizes, dim=1), strict=True):
        rows, cols = params[i].shape
        found[i] = place.reshape(-1, cols)[:rows]
    return found


def _own_rows(matrix: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    if not _rows_are_apart(param):
        return matrix
    mesh = cast(DTensor, param).device_mesh
    size = -(-len(matrix) // mesh.size())
    return matrix[size * mesh.get_local_rank() :][:size]


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Approximately U V^T of each of [N, rows, cols], rows <= cols (singular values pushed into about 0.7..1.2).

    The quintic a X + (b A + c A^2) X with A = X X^T, from X / |X|_F; FLOPs per matrix 5 (4 rows^2 cols + 2 rows^3).
    bf16 on GPUs, where the iteration is known to tolerate it; fp32 on CPUs.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def lr_at(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int = 0,
    lr_scheduler_type: str = "constant",
    min_lr_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> float:
    """Multiplier of the learning rate for the update number `step` (0-based) of max_steps.

    Warm-up (all types): (step + 1) / warmup_steps, so the first update already moves. Then with progress p in [0, 1)
    over the remaining steps: constant 1; linear and cosine from 1 down to min_lr_ratio; wsd: 1, and over the last
    decay_ratio of max_steps linearly down to min_lr_ratio.
    """
    if lr_scheduler_type not in LR_SCHEDULES:
        raise ValueError(f"unknown lr_scheduler_type {lr_scheduler_type!r}; expected one of {', '.join(LR_SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if lr_scheduler_type == "constant":
        return 1.0
    decay_steps = round(decay_ratio * max_steps) if lr_scheduler_type == "wsd" else max_steps
    start = max(warmup_steps, max_steps - decay_steps)
    progress = min(max(step - start, 0) / max(max_steps - start, 1), 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if lr_scheduler_type == "cosine" else 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape
