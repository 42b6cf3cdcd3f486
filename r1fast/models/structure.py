"""Whether a decoder is still what its config builds: what generation computes is the same function only then.

Training runs `forward` of every module. Generation runs `decode`, which passes some modules by, and where it can
decode_layers, which runs none and reads weights by name. What somebody added to a decoder could be left out in silence:

    changed or added: a method, hook, parameter, attribute     decode             decode_layers
    a projection, norm, MLP, router, experts                   runs it            not used: the modules are
    the decoder, a layer, its attention, kv_b_proj;            leaves it out:     not used: error
      a hook of embedding, last norm or head                   error
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r1fast.models.model_config import ModelConfig
from r1fast_kernels.torch_private import CHECKPOINT_WRAPPED, forward_hooks

_METHODS = ("forward", "decode", "_mlp", "_project", "_queries", "_latents", "_cached")
_STATE = {"training"}  # changes no result
# Not called, but run by the `forward` alone, past hooks (decoder.py).
_HOOKS_PASSED_BY = ("embed_tokens", "norm", "lm_head", "score")

Methods = dict[type, dict[str, Any]]


def methods_of(*kinds: type) -> Methods:
    """What these classes compute; taken when their module is loaded, so that later patches are seen."""
    return {kind: {name: getattr(kind, name, None) for name in _METHODS} for kind in kinds}


@dataclass(frozen=True)
class Part:
    """What a module computes with, but for the values of its tensors."""

    kind: type
    methods: dict[str, Any]
    shapes: dict[str, torch.Size]  # of parameters and buffers
    attributes: dict[str, Any]  # all names; values of numbers, words and configs


def parts(decoder: nn.Module) -> dict[str, Part]:
    """By name; FSDP's classes and the wrappers of activation checkpointing are looked through."""
    found = {}
    for name, module in decoder.named_modules():
        if CHECKPOINT_WRAPPED in dict(module.named_children()):
            continue
        kind, own = type(module), vars(module)
        # FSDP makes a class of (FSDPModule, the module's own). Known by its home: model code imports no mesh.
        kind = next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))
        attributes = {
            key: value if isinstance(value, (int, float, str, tuple, ModelConfig)) else None
            for key, value in own.items()
            if key not in _STATE and key not in _METHODS and (not key.startswith("_") or isinstance(value, Tensor))
        }
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        found[_unwrapped(name)] = Part(
            kind,
            {key: own.get(key, getattr(kind, key, None)) for key in _METHODS},
            {key: value.shape for key, value in tensors.items()},
            attributes,
        )
    return found


def check(decoder: nn.Module, built: dict[str, Part], known: Methods) -> list[str]:
    """What is not as in `built` and `known`, and runs by modules. Raises ValueError where decode would leave it out."""
    now, found = parts(decoder), []
    for name in {**built, **now}:
        label = name or "the decoder"
        if name not in built or name not in now:
            found.append(f"{label} is {'gone' if name in built else 'new'}")
            continue
        differences = [*_of_methods(now[name], known), *_of_tensors(now[name], built[name])]
        passed_by = _is_passed_by(name)
        for text, left_out in differences:
            found.append(f"{label} {text}")
            if passed_by and (left_out or name.endswith("kv_b_proj")):
                _refuse(found[-1])
    for name, hook in _hooks(decoder):
        found.append(f"{name or 'the decoder'} has the hook {hook}")
        if _is_passed_by(name) or name in _HOOKS_PASSED_BY:
            _refuse(found[-1])
    return found


def _of_methods(part: Part, known: Methods) -> Iterator[tuple[str, bool]]:
    """(difference, whether it is one of forward that decode does not follow)."""
    base = next((kind for kind in part.kind.__mro__ if kind in known), None)
    if base is None:
        yield f"is a {part.kind.__name__}", True
    elif part.methods != known[base]:
        changed = [name for name in _METHODS if part.methods[name] != known[base][name]]
        yield f"is a {part.kind.__name__} with its own {', '.join(changed)}", "decode" not in changed
    elif part.kind is not base:
        yield f"is a {part.kind.__name__}", False


def _of_tensors(part: Part, built: Part) -> Iterator[tuple[str, bool]]:
    absent = object()
    for word, ours, theirs in (
        ("tensor", part.shapes, built.shapes), ("attribute", part.attributes, built.attributes)
    ):  # fmt: skip
        for name in {**theirs, **ours}:
            if ours.get(name, absent) != theirs.get(name, absent):
                yield f"has another {word} {name}", False


def _hooks(decoder: nn.Module) -> Iterator[tuple[str, str]]:
    everywhere = nn.modules.module
    for hook in (*everywhere._global_forward_pre_hooks.values(), *everywhere._global_forward_hooks.values()):
        yield "", getattr(hook, "__qualname__", repr(hook))
    for name, module in decoder.named_modules():
        for hook in forward_hooks(module):
            if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp"):
                yield _unwrapped(name), getattr(hook, "__qualname__", repr(hook))


def _unwrapped(name: str) -> str:
    return ".".join(step for step in name.split(".") if step != CHECKPOINT_WRAPPED)


def _is_passed_by(name: str) -> bool:
    """Whether decode computes what the module does without calling it."""
    steps = name.split(".")
    if steps[0] != "layers":
        return name == ""
    return len(steps) == 2 or steps[2:] in (["self_attn"], ["self_attn", "kv_b_proj"])


def _refuse(what: str) -> None:
    raise ValueError(
        f"generation would leave out what training computes: {what}, which decoding does not run. Give the module a "
        "`decode` of its own, or take this off before generating"
    )
