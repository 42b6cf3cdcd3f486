"""What the GPU cases of bench/cases.py launch on an H200: every kernel with its specialisation, grid and arguments.

Each op is called as its bench calls it, on a GPU that launches nothing (tests/kernels/fake_gpu.py). FLOPs of products
that are the vendor's are counted. Where large grouped products are torch's, `own` asks for ours in their place.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import r1fast_kernels as kernels
from bench.cases import Case
from bench.decode_step import step
from r1fast_kernels.decode_attention_triton import BLOCK
from r1fast_kernels.grouped_gemm import grouped_gemm
from tests.kernels.fake_gpu import Launch, TensorArgument, fake_gpu
from tests.kernels.launch_cases import backward, new

VENDOR = "r1fast_kernels.grouped_gemm_vendor"
BF16, INT32, INT64 = torch.bfloat16, torch.int32, torch.int64
DTYPES = {"bf16": BF16, "fp32": torch.float32}
PRODUCTS = {"mm", "addmm", "bmm"}
# H, K, d, e of Qwen2.5-1.5B, DeepSeek-V2-Lite and DeepSeek-V3
DECODE_HEADS = {"gqa": (12, 2, 128, 128), "mla": (16, 1, 576, 512), "mla128": (128, 1, 576, 512)}


@dataclass
class Call:
    """One call of a public op."""

    launches: list[Launch] = field(default_factory=list)
    product_flops: float = 0.0  # of the vendor's
    grouped_flops: list[tuple[float, float]] = field(default_factory=list)  # (FLOPs, rows an expert) of each of torch's


def tensor_bytes(launch: Launch, *names: str) -> float:
    """Of all tensors that it was given, or of those named, each read or written once."""
    given = tuple(x for name, x in launch.arguments.items() if not names or name in names)
    leaves = tree_leaves(given, is_leaf=lambda x: isinstance(x, TensorArgument))
    tensors = [x for x in leaves if isinstance(x, TensorArgument)]
    return float(sum(torch.Size(x.shape).numel() * x.dtype.itemsize for x in tensors))


@contextmanager
def recorded(*, own: bool) -> Iterator[Call]:
    """What public functions that are called in this block, on tensors that are made in it, would launch on an H200."""
    call = Call()

    def count(operator: Any, inputs: list[Any], outputs: list[Any]) -> None:
        name = operator._schema.name.removeprefix("aten::")
        factors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        if "out" in operator._overloadname.split("_"):
            factors = factors[:-1]
        if name in PRODUCTS:
            call.product_flops += 2.0 * factors[-2].numel() * factors[-1].shape[-1]
        elif name == "_grouped_mm":
            (offsets,) = (x for x in inputs if isinstance(x, Tensor) and not x.is_floating_point())
            rows = max(factors[0].shape) if factors[1].dim() == 2 else factors[0].shape[0]
            call.grouped_flops.append((2.0 * factors[0].numel() * factors[1].shape[-1], rows / len(offsets)))

    with pytest.MonkeyPatch.context() as patch, fake_gpu() as gpu:
        patch.setattr(sys.modules[VENDOR], "on_hopper", lambda _: not own)
        patch.setattr(gpu, "note", count)
        call.launches = gpu.launches
        yield call


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
    outputs: Any
    if case.op == "linear_logprobs":
        outputs = kernels.linear_logprobs(*head, ids, with_entropy=True)
    elif case.op == "linear_cross_entropy":
        outputs = (kernels.linear_cross_entropy(*head, ids, ignore_index=None),)
    else:
        N = case.sizes["N"]
        outputs = kernels.linear_grpo_loss(
            *head, ids, new(N + 1, dtype=INT32), rewards_N=new(N), group_ids_N=new(N, dtype=INT64),
            old_logprobs_T=new(T), ref_logprobs_T=new(T), beta=0.04,
        )[:1]  # fmt: skip
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
    B, T, dtype = case.sizes["B"], case.sizes["T"], DTYPES[case.dtype]
    H, K, d, e = DECODE_HEADS[case.mode]
    width = -(-T // BLOCK)
    keys = new(B * width * BLOCK, K, d, dtype=dtype)
    values = keys[..., :e] if case.mode != "gqa" else new(*keys.shape[:2], e, dtype=dtype)
    table, lengths = new(B, width, dtype=INT32), new(B, dtype=INT32)
    kernels.decode_attention(new(B, H, d, dtype=dtype), keys, values, table, lengths, scale=0.1)


def _decode_parts(case: Case, call: Call) -> None:
    def of_dtype(*shape: int) -> Tensor:
        return new(*shape, dtype=DTYPES[case.dtype])

    B = case.sizes["B"]
    step(case.mode, B, of_dtype, new(B, dtype=INT64))(None)


CALLS: dict[str, Callable[[Case, Call], None]] = {
    "selective_logprobs": _selective, "linear_logprobs": _head, "linear_cross_entropy": _head,
    "linear_grpo_loss": _head, "group_advantages": _advantages, "grpo_loss": _grpo, "route_topk": _route,
    "grouped_gemm": _grouped, "moe_experts": _experts, "sample_tokens": _sample, "decode_attention": _decode,
    "decode_parts": _decode_parts,
}  # fmt: skip


def record(case: Case, *, own: bool = False) -> Call:
    with recorded(own=own) as call:
        CALLS[case.op](case, call)
    return call
