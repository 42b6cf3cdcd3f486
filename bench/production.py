"""What the GPU cases of bench/cases.py launch: every kernel with its specialisation, grid and arguments, without a GPU.

Each op is called as its bench calls it, with tensors that have sizes and no values (tests/kernels/launches.py): its
launchers run, and a launch is kept in place of being compiled and started. Products that are the vendor's are counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.jit import JITFunction

import r1fast_kernels as kernels
from bench.cases import Case
from r1fast_kernels.decode_attention import BLOCK
from r1fast_kernels.grouped_gemm import grouped_gemm
from tests.kernels.launches import backward, recording

BF16, INT32, INT64 = torch.bfloat16, torch.int32, torch.int64
DTYPES = {"bf16": BF16, "fp32": torch.float32}


@dataclass(frozen=True)
class Launch:
    """A kernel, specialised, and what it was given."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]  # of the compiler
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's names; constants too

    @property
    def kernel(self) -> str:
        return str(self.function.__name__)

    @property
    def programs(self) -> int:
        total = 1
        for size in self.grid:
            total *= size
        return total

    @property
    def specialisation(self) -> str:
        options = sorted(self.options.items())
        return f"{self.kernel} {self.signature} {self.constants} {self.attributes} {options}"

    def tensor_bytes(self) -> float:
        """Of all tensors that it was given, each storage once: what is read once, or written once."""
        seen: dict[int, int] = {}
        for x in self.arguments.values():
            for tensor in x if isinstance(x, (tuple, list)) else (x,):
                if isinstance(tensor, Tensor):
                    key = tensor.untyped_storage()._cdata
                    seen[key] = max(seen.get(key, 0), tensor.numel() * tensor.element_size())
        return float(sum(seen.values()))


@dataclass
class Call:
    """One call of a public op."""

    launches: list[Launch] = field(default_factory=list)
    vendor_flops: float = 0.0


class _Products(TorchDispatchMode):
    """Counts FLOPs of the vendor's products, in our operators too, which run their CUDA implementations."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "_grouped_mm"):
            tensors = [x for x in args if isinstance(x, Tensor)]
            a, b = tensors[-2:] if func.overloadpacket.__name__ != "_grouped_mm" else tensors[:2]
            self.call.vendor_flops += 2.0 * a.numel() * b.shape[-1]
        if func.namespace != "r1fast":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[Call]:
    """What public functions that are called in this block, on tensors that are made in it, would launch."""
    call, run = Call(), JITFunction.run

    def keep(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **given: Any) -> None:
        def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
            options |= {name: value for name, value in given.items() if name not in self.arg_names}
            named = dict(zip(self.arg_names, args)) | {x: y for x, y in given.items() if x in self.arg_names}
            call.launches.append(
                Launch(self, compile["signature"], compile["constants"], compile["configs"][0], options, grid, named)
            )
            return True  # do not compile

        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, take
        try:
            run(self, *args, grid=grid, warmup=warmup, **given)
        finally:
            knobs.runtime.jit_cache_hook = before

    with recording(), _Products(call):
        JITFunction.run = keep
        try:
            yield call
        finally:
            JITFunction.run = run


def new(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=learns)


def _selective(case: Case, call: Call) -> None:
    T, V = case.sizes["T"], case.sizes["V"]
    outputs = kernels.selective_logprobs(
        new(T, V, dtype=DTYPES[case.dtype], learns=case.mode != "fwd"), new(T, dtype=INT64), with_entropy=True
    )
    if case.mode == "bwd":
        call.launches.clear()
    if case.mode != "fwd":
        backward(*outputs)


def _head(case: Case, call: Call) -> None:
    T, D, V = (case.sizes[letter] for letter in "TDV")
    learns, dtype = case.mode != "fwd", DTYPES[case.dtype]
    head = new(T, D, dtype=dtype, learns=learns), new(V, D, dtype=dtype, learns=learns)
    ids = new(T, dtype=INT64)
    if case.op == "linear_logprobs":
        outputs = kernels.linear_logprobs(*head, ids, with_entropy=True)
    elif case.op == "linear_cross_entropy":
        outputs = (kernels.linear_cross_entropy(*head, ids, ignore_index=None),)
    else:
        N = case.sizes["N"]
        loss, _ = kernels.linear_grpo_loss(
            *head, ids, new(N + 1, dtype=INT32), rewards_N=new(N), group_ids_N=new(N, dtype=INT64),
            old_logprobs_T=new(T), ref_logprobs_T=new(T), beta=0.04,
        )  # fmt: skip
        outputs = (loss,)
    if learns:
        backward(*outputs)


def _advantages(case: Case, call: Call) -> None:
    N = case.sizes["N"]
    kernels.group_advantages(new(N), new(N, dtype=INT64))


def _grpo(case: Case, call: Call) -> None:
    N, T = case.sizes["N"], case.sizes["N"] * case.sizes["L"]
    loss, _ = kernels.grpo_loss(
        new(T, learns=True), new(N + 1, dtype=INT32), advantages_N=new(N), old_logprobs_T=new(T),
        ref_logprobs_T=new(T), sampler_logprobs_T=new(T), beta=0.04, is_cap=2.0,
    )  # fmt: skip
    backward(loss)


def _route(case: Case, call: Call) -> None:
    T, E, K = (case.sizes[letter] for letter in "TEK")
    _, weights, _ = kernels.route_topk(
        new(T, E, learns=True), new(E), top_k=K, n_group=8, topk_group=4, routed_scaling_factor=2.5
    )
    backward(weights)


def _grouped(case: Case, call: Call) -> None:
    T, D, F, E, K = (case.sizes[letter] for letter in "TDFEK")
    learns, dtype = case.mode != "fwd", DTYPES[case.dtype]
    out = grouped_gemm(
        new(T * K, D, dtype=dtype, learns=learns), new(E, 2 * F, D, dtype=dtype, learns=learns), new(E, dtype=INT32)
    )
    backward(out)


def _experts(case: Case, call: Call) -> None:
    T, D, F, E, K = (case.sizes[letter] for letter in "TDFEK")
    learns, dtype = case.mode != "fwd", DTYPES[case.dtype]
    weights = new(E, 2 * F, D, dtype=dtype, learns=learns), new(E, D, F, dtype=dtype, learns=learns)
    ids, gates = new(T, K, dtype=INT64), new(T, K, learns=learns)
    backward(kernels.moe_experts(new(T, D, dtype=dtype, learns=learns), *weights, ids, gates))


def _sample(case: Case, call: Call) -> None:
    name, _, value = case.mode.partition("=")
    options: dict[str, Any] = {name: float(value) if name == "top_p" else int(value)} if value else {}
    B = case.sizes["B"]
    kernels.sample_tokens(new(B, case.sizes["V"], dtype=DTYPES[case.dtype]), seeds_B=new(B, dtype=INT64), **options)


def _decode(case: Case, call: Call) -> None:
    """Qwen2.5-1.5B's heads, and DeepSeek-V2-Lite's."""
    B, T, dtype = case.sizes["B"], case.sizes["T"], DTYPES[case.dtype]
    H, K, d, e = {"gqa": (12, 2, 128, 128), "mla": (16, 1, 576, 512)}[case.mode]
    width = -(-T // BLOCK)
    keys = new(B * width * BLOCK, K, d, dtype=dtype)
    values = keys[..., :e] if case.mode == "mla" else new(*keys.shape[:2], e, dtype=dtype)
    table, lengths = new(B, width, dtype=INT32), new(B, dtype=INT32)
    kernels.decode_attention(new(B, H, d, dtype=dtype), keys, values, table, lengths, scale=0.1)


CALLS: dict[str, Callable[[Case, Call], None]] = {
    "selective_logprobs": _selective, "linear_logprobs": _head, "linear_cross_entropy": _head,
    "linear_grpo_loss": _head, "group_advantages": _advantages, "grpo_loss": _grpo, "route_topk": _route,
    "grouped_gemm": _grouped, "moe_experts": _experts, "sample_tokens": _sample, "decode_attention": _decode,
}  # fmt: skip


def record(case: Case) -> Call:
    with recorded() as call:
        CALLS[case.op](case, call)
    return call
