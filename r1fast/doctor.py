"""python -m r1fast.doctor: what this machine offers, and which implementation each op uses here, with the reason."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from r1fast.models.decoder import Decoder

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "math-verify", "numpy")
_EXTRAS = ("flash-attn-3", "flash-attn", "vllm", "reasoning-gym", "wandb", "trackio", "tensorboard")
BUILD = "pip install --no-build-isolation -e ."


def versions() -> list[tuple[str, str]]:
    """r1fast, Python, and every package that a run may use; the optional ones in one line."""
    extras = [f"{name} {version}" for name in _EXTRAS if (version := _version(name))]
    found = [("r1fast", _version("r1fast") or "not installed, only on the path"), ("python", platform.python_version())]
    found += [(name, _version(name) or "not installed") for name in _PACKAGES]
    return [*found, ("optional", ", ".join(extras) or "none installed")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[tuple[str, str]]:
    """Processor, threads, accelerator, distributed backends, and the C++ extension."""
    is_available = getattr(torch.distributed, "is_backend_available", lambda _: False)  # of a build without: none
    found = [name for name in ("gloo", "nccl") if is_available(name)]
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("cpu", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("gpu", _gpus()),
        ("collectives", ", ".join(found) or "none: one process only"),
        ("C++ ops", _extension()),
    ]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none seen (torch is built for {built})" if built else "none (torch is a CPU build)"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "\n".join(
        f"{index}: {device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        for index, device in enumerate(devices)
    )


def _extension() -> str:
    try:
        spec = importlib.util.find_spec("r1fast_kernels._C")
    except ImportError as error:  # importing the parent package is part of the search
        return f"cannot be used: {error}"
    if spec is None:
        return f"not built; run: {BUILD}"
    return f"built ({os.path.basename(spec.origin or '')})"


def op_choices() -> list[tuple[str, str, str, str]]:
    """(op, implementations that exist, the one used here, why), from a tiny call of each op on this device."""
    from r1fast_kernels import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen: dict[str, tuple[str, str]] = {}
    for op, call in tiny_calls(device).items():
        try:
            call()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # what the doctor is asked to find
            chosen[op] = "fails", f"{type(error).__name__}: {error}"
    chosen = {op: (impl, reason) for (op, impl), reason in dispatch.choices.items()} | chosen
    return [(op, ", ".join(exists), *chosen[op]) for op, exists in dispatch.IMPLEMENTATIONS.items()]


def tiny_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """A call of each op in the dtypes of a default run on this device."""
    import r1fast_kernels as kernels

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ones = partial(torch.ones, device=device, dtype=dtype)
    floats, ints = partial(torch.zeros, device=device), partial(torch.zeros, device=device, dtype=torch.int64)
    hidden_TD, weight_VD, ids_T = ones(4, 8), ones(16, 8), ints(4)
    logits_TV, heads_TKd, slots_SKd = hidden_TD @ weight_VD.T, ones(4, 1, 8), ones(16, 1, 8)
    cu_seqlens = torch.tensor([0, 2, 4], device=device, dtype=torch.int32)
    offsets_E, rewards_N = torch.tensor([2, 4], device=device), torch.tensor([0.0, 1.0], device=device)
    experts_TK, up_EDF, down_EFD = ints(4, 1), ones(2, 8, 8), ones(2, 8, 4)
    calls: dict[str, Callable[[Any], Any]] = {
        "selective_logprobs": lambda op: op(logits_TV, ids_T),
        "linear_logprobs": lambda op: op(hidden_TD, weight_VD, ids_T),
        "linear_cross_entropy": lambda op: op(hidden_TD, weight_VD, ids_T, ignore_index=None),
        "group_advantages": lambda op: op(rewards_N, ints(2)),
        "grpo_loss": lambda op: op(floats(4), cu_seqlens, advantages_N=rewards_N),
        "linear_grpo_loss": lambda op: op(hidden_TD, weight_VD, ids_T, cu_seqlens, advantages_N=rewards_N),
        "route_topk": lambda op: op(floats(4, 2), floats(2), top_k=1),
        "moe_dispatch": lambda op: op(experts_TK, 2),
        "grouped_gemm": lambda op: op(hidden_TD, up_EDF, offsets_E),
        "moe_experts": lambda op: op(hidden_TD, up_EDF, down_EFD, experts_TK, floats(4, 1)),
        "decode_attention": lambda op: op(
            heads_TKd[:1], slots_SKd, slots_SKd, cu_seqlens[None, :1], cu_seqlens[1:2], scale=1.0
        ),
        "rms_norm": lambda op: op(hidden_TD, hidden_TD[0]),
        "sample_tokens": lambda op: op(logits_TV),
    }
    by_op = {name: partial(call, getattr(kernels, name)) for name, call in calls.items()}
    of_models = {"packed_attention": partial(attend_once, heads_TKd, cu_seqlens)}
    return {**by_op, **of_models, "decode_layers": partial(decode_once, device, dtype)}


def attend_once(heads_TKd: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """As models do, which take other libraries' kernels on a GPU."""
    from r1fast.models.attention import AttentionPlan, packed_attention

    plan = AttentionPlan(cu_seqlens, len(heads_TKd), heads_TKd.device)
    return packed_attention(heads_TKd, heads_TKd, heads_TKd, plan, None, 1.0)


@cache
def _tiny_decoder(device: torch.device, dtype: torch.dtype) -> "Decoder":
    from r1fast.models.decoder import Decoder
    from r1fast.models.model_config import ModelConfig

    config = ModelConfig(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = Decoder(config).to(device, dtype)
    model.init_weights()
    return model


def decode_once(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    from r1fast.models.cache import BlockCache
    from r1fast.rollout.fast_decode import fast_decode

    model = _tiny_decoder(device, dtype)
    ids_B = torch.zeros(1, dtype=torch.int64, device=device)
    decoder = fast_decode(model) or model
    return decoder.decode(ids_B, ids_B, BlockCache(model.config, 1, dtype, device), ids_B[:, None].int())


def _table(title: str, rows: Sequence[tuple[str, ...]], headings: tuple[str, ...] = ()) -> Table:
    style: Any = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
    table = Table(title=title, show_header=bool(headings), **style)
    for i, heading in enumerate(headings or ("", "")):
        table.add_column(heading, style="cyan" if i == 0 else "", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def main() -> int:
    console = Console()
    console.print(Group(_table("Versions", versions()), _table("Machine", machine())))
    try:
        choices = op_choices()
    except ImportError as error:
        console.print(Text(f"r1fast_kernels cannot be imported: {error}; run: {BUILD}", "red"))
        return 1
    console.print(_table("Kernels", choices, ("op", "exists as", "runs here", "because")))
    return 1 if any(row[2] == "fails" for row in choices) else 0


if __name__ == "__main__":
    sys.exit(main())
