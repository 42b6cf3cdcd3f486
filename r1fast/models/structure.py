"""Whether a decoder is still what its config builds: what generation computes is the same function only then.

Training runs `forward` of every module. Generation runs `decode`, which passes some modules by, and where it can
decode_layers, which runs none and reads weights by name. What somebody added to a decoder could be left out in silence:

    changed or added: a method, hook, parameter, attribute     decode             decode_layers
    a projection, norm, MLP, router, experts                   runs it            not used: the modules are
    the decoder, a layer, its attention, kv_b_proj;            leaves it out:     not used: error
      a hook of embedding, last norm or head                   error
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1fast.models.model_config import ModelConfig
from r1fast_kernels.torch_private import CHECKPOINT_WRAPPED, forward_hooks, global_forward_hooks

_METHODS = ("forward", "decode", "_mlp", "_norm", "_project", "_queries", "_latents", "_cached")
_STATE = {"training", "built", "in_fp32"}  # change no result; the last: rollout/fast_decode.py asks for it
# Not called, but run by the `forward` alone, past hooks (decoder.py).
_HOOKS_PASSED_BY = ("embed_tokens", "norm", "lm_head", "score")
_PASSED_BY = re.compile(r"|layers\.\d+(\.self_attn(\.kv_b_proj)?)?")
_OUR_CODE = str(Path(__file__).parent), str(Path(torch.__file__).parent)

# For each module, by name, what it computes with but for the values of its tensors: its class, its methods, the shapes
# of its parameters and buffers, its attributes (of numbers, words and configs the values too), its hooks.
Structure = dict[str, dict[str, Any]]


def structure_of(decoder: nn.Module) -> Structure:
    """FSDP's classes and hooks and the wrappers of activation checkpointing are looked through."""
    found = {
        unwrapped(name): _describe(module)
        for name, module in decoder.named_modules()
        if CHECKPOINT_WRAPPED not in dict(module.named_children())
    }
    found[""] |= _described(global_forward_hooks())
    return found


def _describe(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    # FSDP makes a class of (FSDPModule, the module's own). Known by its home: model code imports no mesh.
    kind = next(base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed."))
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return {
        "class": kind,
        **{name: own.get(name, getattr(kind, name, None)) for name in _METHODS},
        **{f"tensor {name}": tensor.shape for name, tensor in tensors.items()},
        **{
            f"attribute {name}": value if isinstance(value, (int, float, str, tuple, ModelConfig)) else None
            for name, value in own.items()
            if name not in _STATE and name not in _METHODS and (name[0] != "_" or isinstance(value, Tensor))
        },
        **_described(forward_hooks(module)),
    }


def _described(hooks: list[Any]) -> dict[str, Any]:
    return {
        f"hook {getattr(hook, '__qualname__', repr(hook))}": hook
        for hook in hooks
        if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
    }


def differences(decoder: nn.Module, built: Structure) -> list[str]:
    """What is not as it was built, and runs by modules. Raises ValueError where decode would leave it out."""
    now, found = structure_of(decoder), []
    for name in {**built, **now}:
        label, module, as_built = name or "the decoder", now.get(name, {}), built.get(name, {})
        if not module or not as_built:
            found.append(f"{label} is {'new' if module else 'gone'}")
            continue
        changed = [key for key in {**as_built, **module} if _has_changed(key, as_built, module)]
        if changed:
            found.append(f"{label} has another {', another '.join(changed)}")
        if _leaves_out(name, changed, module["decode"] is not None):
            raise ValueError(
                f"generation would leave out what training computes: {found[-1]}, which decoding does not run. Give "
                "the module a `decode` of its own, or take this off before generating"
            )
    return found


def _has_changed(key: str, as_built: dict[str, Any], now: dict[str, Any]) -> bool:
    if key.startswith("hook "):  # also one that was there before the model
        return key in now
    if (key in now) != (key in as_built) or now[key] != as_built[key]:
        return True
    if key not in _METHODS or now[key] is None:
        return False
    # A class that was patched before a model was built from it is known by where its code is.
    code = getattr(now[key], "__code__", None)
    return code is None or not code.co_filename.startswith(_OUR_CODE)


def _leaves_out(name: str, changed: list[str], has_decode: bool) -> bool:
    """Whether decode computes what the module did when it was built, without calling it."""
    is_hooked = any(key.startswith("hook ") for key in changed)
    if not _PASSED_BY.fullmatch(name):
        return is_hooked and name in _HOOKS_PASSED_BY
    if is_hooked or name.endswith("kv_b_proj"):
        return bool(changed)
    follows = has_decode and "decode" in changed
    return not follows and not set(_METHODS).isdisjoint(changed)


def unwrapped(name: str) -> str:
    return ".".join(step for step in name.split(".") if step != CHECKPOINT_WRAPPED)
