"""python -m r1fast.doctor: what this machine offers, and which implementation each op uses here, with the reason."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from r1fast import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "math-verify", "numpy")
_EXTRAS = ("flash-attn", "vllm", "reasoning-gym", "wandb", "trackio", "tensorboard")
_CHOICE = re.compile(r"^(?P<op>\S+) runs (?P<impl>\S+) \((?P<reason>.*)\)$", re.DOTALL)


def versions() -> list[tuple[str, str]]:
    """r1fast, Python, and every package that a run may use; the optional ones in one line."""
    extras = [f"{name} {version}" for name in _EXTRAS if (version := _version(name))]
    found = [("r1fast", __version__), ("python", platform.python_version())]
    found += [(name, _version(name) or "not installed") for name in _PACKAGES]
    return [*found, ("optional", ", ".join(extras) or "none installed")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[tuple[str, str]]:
    """Processor, threads, accelerator, distributed backends, and the C++ extension."""
    backends = [("gloo", torch.distributed.is_gloo_available), ("nccl", torch.distributed.is_nccl_available)]
    found = [name for name, available in backends if torch.distributed.is_available() and available()]
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("cpu", f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("gpu", _gpus()),
        ("collectives", ", ".join(found) or "none: one process only"),
        ("C++ ops", _extension()),
    ]


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none seen (torch is built for {built})" if built else "none (torch is a CPU build)"
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        lines.append(f"{index}: {device.name}, sm_{device.major}{device.minor}, {memory}")
    return "\n".join(lines)


def _extension() -> str:
    try:
        spec = importlib.util.find_spec("r1fast_kernels._C")
    except ImportError as error:  # importing the parent package is part of the search
        return f"cannot be used: {error}"
    if spec is None:
        return "not built; run: pip install --no-build-isolation -e ."
    return f"built ({os.path.basename(spec.origin or '')})"


def op_choices() -> list[tuple[str, str, str, str]]:
    """(op, implementations that exist, the one used here, why), from a tiny call of each op on this device.

    The ops tell it themselves, in the line that dispatch logs once per outcome: call this before any op has run.
    """
    from r1fast_kernels import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    dispatch.logger.addHandler(handler)
    dispatch.logger.setLevel(logging.INFO)
    try:
        failures = {op: failure for op, call in tiny_calls(device).items() if (failure := _failure(call))}
    finally:
        dispatch.logger.removeHandler(handler)
    choices = {
        match["op"]: (match["impl"], match["reason"]) for line in reversed(lines) if (match := _CHOICE.match(line))
    }
    choices |= {op: ("fails", failure) for op, failure in failures.items()}
    unknown = ("unknown", "the op logged no choice")
    return [(op, ", ".join(exists), *choices.get(op, unknown)) for op, exists in dispatch.IMPLEMENTATIONS.items()]


def _failure(call: Callable[[], Any]) -> str | None:
    """Run one op; a kernel that cannot run here is what the doctor is asked to find."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def tiny_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """A call of each op in the dtypes of a default run on this device."""
    import r1fast_kernels as kernels

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.ones(4, 8, device=device, dtype=dtype)
    weight_VD = torch.ones(16, 8, device=device, dtype=dtype)
    ids_T = torch.zeros(4, device=device, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 2, 4], device=device, dtype=torch.int32)
    groups_N = torch.zeros(2, device=device, dtype=torch.int64)
    rewards_N = torch.tensor([0.0, 1.0], device=device)
    logits_TV = hidden_TD @ weight_VD.T
    heads_TKd, slots_SKd = hidden_TD[:, None], hidden_TD.repeat(4, 1)[:, None]
    experts_TK = torch.zeros(4, 1, device=device, dtype=torch.int64)
    offsets_E = torch.tensor([2, 4], device=device)
    return {
        "selective_logprobs": lambda: kernels.selective_logprobs(logits_TV, ids_T),
        "linear_logprobs": lambda: kernels.linear_logprobs(hidden_TD, weight_VD, ids_T),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(hidden_TD, weight_VD, ids_T, ignore_index=None),
        "group_advantages": lambda: kernels.group_advantages(rewards_N, groups_N),
        "grpo_loss": lambda: kernels.grpo_loss(torch.zeros(4, device=device), cu_seqlens, advantages_N=rewards_N),
        "linear_grpo_loss": lambda: kernels.linear_grpo_loss(
            hidden_TD, weight_VD, ids_T, cu_seqlens, advantages_N=rewards_N
        ),
        "route_topk": lambda: kernels.route_topk(
            torch.zeros(4, 2, device=device), torch.zeros(2, device=device), top_k=1
        ),
        "moe_dispatch": lambda: kernels.moe_dispatch(experts_TK, 2),
        "grouped_gemm": lambda: kernels.grouped_gemm(
            hidden_TD, torch.ones(2, 8, 8, device=device, dtype=dtype), offsets_E
        ),
        "moe_experts": lambda: kernels.moe_experts(
            hidden_TD,
            torch.ones(2, 8, 8, device=device, dtype=dtype),
            torch.ones(2, 8, 4, device=device, dtype=dtype),
            experts_TK,
            torch.ones(4, 1, device=device),
        ),
        "decode_attention": lambda: kernels.decode_attention(
            heads_TKd[:1], slots_SKd, slots_SKd, cu_seqlens[None, :1], cu_seqlens[1:2], scale=1.0
        ),
        "decode_layers": lambda: decode_once(device, dtype),
        "packed_attention": lambda: kernels.packed_attention(heads_TKd, heads_TKd, heads_TKd, cu_seqlens, scale=1.0),
        "rms_norm": lambda: kernels.rms_norm(hidden_TD, hidden_TD[0]),
        "sample_tokens": lambda: kernels.sample_tokens(logits_TV),
    }


def decode_once(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    from r1fast.models.cache import BlockCache
    from r1fast.models.decoder import Decoder
    from r1fast.models.model_config import ModelConfig

    config = ModelConfig(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = Decoder(config).to(device, dtype)
    model.init_weights()
    ids_B = torch.zeros(1, dtype=torch.int64, device=device)
    return model.decode(ids_B, ids_B, BlockCache(config, 1, dtype, device), ids_B[:, None].int())


def _table(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_header=bool(headings)
    )
    for i, heading in enumerate(headings or ("", "")):
        table.add_column(heading, style="cyan" if i == 0 else "", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def main() -> int:
    console = Console()
    console.print(Group(_table("Versions", (), versions()), _table("Machine", (), machine())))
    try:
        choices = op_choices()
    except ImportError as error:
        console.print(
            Text(f"r1fast_kernels cannot be imported: {error}; run: pip install --no-build-isolation -e .", "red")
        )
        return 1
    console.print(_table("Kernels", ("op", "exists as", "runs here", "because"), choices))
    return 1 if any(row[2] == "fails" for row in choices) else 0


if __name__ == "__main__":
    sys.exit(main())
