"""Everything that turns a single-device decoder into a sharded one, in the order that matters.

    activation checkpointing -> compile (per block, in place) -> fully_shard

checkpoint_wrapper around an already sharded block breaks torch.compile, and the wrappers must be inside the unit whose
weights FSDP gathers. One FSDP unit is one gather and one reduce-scatter:

    root [ embed_tokens | layers.0 | layers.1 | ... | norm + head ]        tied weights: [ embed_tokens + norm + head ]

Gradients are SUMMED over ranks: the loss of a rank is already divided by the global count, so that the result does not
depend on how many ranks there are. Only `forward` gathers weights; other entry points (decode) run in generation_phase.
What `forward` returns must be tensors in tuples, lists or dicts: FSDP looks for them there to prepare its backward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from r1fast.parallel.mesh import Dist
from r1fast_kernels import torch_private

# A smaller model is one FSDP unit: it is bound by the latency of hooks and collectives, not by memory (about 10 bytes
# per parameter while gathered). MLA + MoE of 3 layers, D 64, 1,024 tokens, one rank, one CPU thread: a whole step takes
# 35.1 ms without FSDP, 37.6 in one unit, 41.2 in five.
ONE_UNIT_NUMEL = 16_000_000
BLOCK_BYTES = 64 << 20
ActivationCheckpointing = Literal["none", "selective", "full"]
# By name: an overload packet (aten.mm) among operators (aten.mm.default) would never be found (pytorch#176065).
KEPT_OPS = frozenset({
    "aten::mm", "aten::mm.dtype", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise",
    "r1fast::packed_attention", "r1fast::moe_experts", "r1fast::grouped_gemm", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
})  # fmt: skip
_RESHARD_FLAG = "_reshard_after_forward_in_training"  # FSDP has a setter for it and no getter


def parallelize(
    model: nn.Module,
    dist: Dist,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    one_unit_numel: int = ONE_UNIT_NUMEL,
) -> nn.Module:
    """Shard `model` (attributes embed_tokens, layers, norm, lm_head or score) over dist.mesh, in place.

    param_dtype: dtype of the gathered weights and of the compute; the shards that the optimizer sees stay fp32 for a
    model that is trained, and keep their dtype for one with frozen weights. reduce_dtype: dtype of the gradient sum.
    activation_checkpointing: "full" keeps the input of each layer and computes the rest again in the backward pass,
    "selective" keeps what products and attention gave too (KEPT_OPS), so that norms, activations and sums are all that
    is computed twice. The gradients have the same bits.
    World size 1 is sharded too: it carries the mixed precision, and state dicts look the same everywhere.
    """
    if all(param.requires_grad for param in model.parameters()):
        model.float()
    layers = model.get_submodule("layers")
    for name, layer in list(layers.named_children()):
        setattr(layers, name, checkpointed(layer, activation_checkpointing))
    if compile:
        for layer in layers.children():
            layer.compile()
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    many_ranks = dist.world_size > 1
    is_small = sum(param.numel() for param in model.parameters()) <= one_unit_numel
    for modules, reshard_after_forward in [*([] if is_small else _units(model, many_ranks)), ([model], False)]:
        fully_shard(modules, mesh=dist.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        for module in modules:
            setattr(module, _RESHARD_FLAG, reshard_after_forward)
    if many_ranks:  # else nothing is divided, and a factor costs one more pass over the gradients
        for unit in fsdp_units(model):
            unit.set_gradient_divide_factor(1.0)
            # A factor alone selects PREMUL_SUM, which gloo does not have and NCCL has had wrong (pytorch#155903).
            unit.set_force_sum_reduction_for_comms(True)
    return model


def checkpointed(layer: nn.Module, kind: ActivationCheckpointing) -> nn.Module:
    """The layer, or what runs it again in the backward pass."""
    if kind == "none":
        return layer
    options: dict[str, Any] = {"preserve_rng_state": False}  # nothing draws from a generator that is kept
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    return torch_private.checkpoint_wrapper(layer, **options)


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _units(model: nn.Module, many_ranks: bool) -> list[tuple[list[nn.Module], bool]]:
    """(modules of one unit, reshard_after_forward) below the root, bottom-up.

    On one rank a reshard frees only the compute copy, and gathering again costs a pass over the weights: keep it.
    """
    children = dict(model.named_children())
    embed, norm, head = children["embed_tokens"], children["norm"], children.get("lm_head") or children["score"]
    units = [([layer], many_ranks) for layer in children["layers"].children()]
    if head.weight is embed.weight:
        return [*units, ([embed, norm, head], False)]
    return [*units, ([embed], many_ranks), ([norm, head], False)]


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """The FSDP modules of a parallelized model, root first; none for a plain one. FSDP's setters do not recurse."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Drop gathered copies, so that parameters() are the shards again and the next forward gathers current weights."""
    for unit in fsdp_units(model):
        unit.reshard()


@contextmanager
def generation_phase(model: nn.Module) -> Iterator[nn.Module]:
    """Gather every weight once; inside, parameters are plain tensors in param_dtype and nothing needs a gradient.

    Extra memory: param_dtype bytes of the whole model. no_grad and not inference_mode: gathering inside inference_mode
    leaves inference tensors behind, and the next training step fails. Do not step an optimizer, clip or zero gradients
    inside: parameters() are other objects there, and the gathered copies would be stale (RuntimeError at the end).
    """
    units = fsdp_units(model)
    if not units:
        raise ValueError(f"generation_phase got a {type(model).__name__} that is not sharded; call parallelize first")
    # Root first: FSDP takes the first module that runs as its root, and decode need not begin at the root's forward.
    torch_private.initialize_fsdp(units[0])
    reshard(model)
    with torch.no_grad():
        # Any optimizer step or load moves the counters of in-place updates.
        versions = [local_tensor(param)._version for param in model.parameters()]
        try:
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            yield model
        finally:
            # For FSDP a forward that a signal has interrupted still runs, and its unit gives up only what it would give
            # up behind it.
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
            reshard(model)
            for unit in units:
                unit.set_reshard_after_forward(getattr(unit, _RESHARD_FLAG), recurse=False)
        if [local_tensor(param)._version for param in model.parameters()] != versions:
            raise RuntimeError("the weights changed inside generation_phase: what was generated used stale copies")


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered, any other tensor itself. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, any other tensor itself. Call under no_grad: then it is a view for free."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parts(model: nn.Module, dist: Dist) -> Iterator[tuple[str, int, torch.Tensor]]:
    """This rank's part of every parameter and persistent buffer: (plain name, first row, rows), to be written to."""
    reshard(model)
    for name, tensor in model.state_dict().items():
        local = local_tensor(tensor)
        first = _rows_of(dist.rank, tensor, dist)[0] if isinstance(tensor, DTensor) else 0
        yield name, first, local


@torch.no_grad()
def gathered_blocks(model: nn.Module, dist: Dist) -> Iterator[tuple[str, int, torch.Tensor]]:
    """For save_model: every weight once, as (plain name, first row, some rows). Collective: to be run to its end.

    No rank ever holds more of another's weights than one block, of BLOCK_BYTES, or one row.
    """
    reshard(model)
    again = {name for names in tied_names(model) for name in names[1:]}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, DTensor):
            yield name, 0, tensor
        elif name not in again:
            local = tensor.to_local()
            for owner in range(dist.world_size):
                first, last = _rows_of(owner, tensor, dist)
                step = max(1, BLOCK_BYTES // (math.prod(tensor.shape[1:]) * tensor.itemsize))
                for start in range(first, last, step):
                    rows = local[start - first : start - first + step]
                    if owner != dist.rank:
                        rows = local.new_empty(min(step, last - start), *tensor.shape[1:])
                    if dist.world_size > 1:
                        torch_dist.broadcast(rows, owner, group=dist.mesh.get_group())
                    yield name, start, rows


def _rows_of(rank: int, tensor: torch.Tensor, dist: Dist) -> tuple[int, int]:
    """Begin and end of a rank's rows of a parameter, as FSDP shards: torch.chunk of the first dimension."""
    most = -(-tensor.shape[0] // dist.world_size)
    return min(rank * most, tensor.shape[0]), min((rank + 1) * most, tensor.shape[0])


def tied_names(model: nn.Module) -> list[list[str]]:
    """The groups of names under which one and the same parameter is registered, first name first."""
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of[id(param)].append(name)
    return [names for names in names_of.values() if len(names) > 1]


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and persistent buffers of a parallelized model into another one, which keeps its dtype.
    Adapters (models/lora.py) are left out.

    Between two models parallelized alike (reference refresh) shard by shard, without communication. Into a plain model,
    whole on every rank, collective: rounded to param_dtype, the weights are those that generation_phase would gather.
    """
    reshard(source)
    reshard(target)
    # state_dict names are the same with and without activation checkpointing, those of named_parameters are not.
    sources, targets = source.state_dict(), target.state_dict()
    sources = {name: tensor for name, tensor in sources.items() if "_lora." not in name}
    if sources.keys() != targets.keys():
        names = sorted(sources.keys() ^ targets.keys())
        raise ValueError(f"the models have different parameters: {names[:5]} ({len(names)}) are in one of them only")
    for name, tensor in sources.items():
        whole = isinstance(tensor, DTensor) and not isinstance(targets[name], DTensor)
        local_tensor(targets[name]).copy_(whole_tensor(tensor) if whole else local_tensor(tensor))


@torch.no_grad()
def grad_norm_and_clip(params: Iterable[nn.Parameter], max_norm: float | None = None) -> torch.Tensor:
    """Global L2 norm of the gradients before clipping (0-d, the same on every rank), and clip to max_norm in place.

    Every rank holds a disjoint part of each DTensor gradient, so the squares are summed over its mesh. max_norm None
    only measures. A non-finite norm clips to non-finite gradients: check it before the optimizer step.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        text = "call backward first, and take parameters() outside generation_phase"
        raise ValueError(f"grad_norm_and_clip got no gradient; {text}")
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        by_mesh[grad.device_mesh if isinstance(grad, DTensor) else None].append(local_tensor(grad))
    squares = []
    for mesh, local_grads in by_mesh.items():
        square = torch.nn.utils.get_total_norm(local_grads).float().square()
        if mesh is not None and mesh.size() > 1:
            torch_dist.all_reduce(square, group=mesh.get_group())
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    if max_norm is not None:
        torch_private.foreach_mul_([local_tensor(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
