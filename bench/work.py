"""What has to be done: by each launch of a GPU case, and by any implementation of the case (its floor)."""

import math
from collections.abc import Callable

from bench.cases import Case
from bench.decode_step import step_bytes
from bench.limits import COPY_BYTES_PER_S, PRODUCT_FLOPS_PER_S, Work
from bench.production import DECODE_HEADS, DTYPES, tensor_bytes
from tests.kernels.fake_gpu import Launch


def _product(launch: Launch, rows: int, inner: int, width: int) -> Work:
    """Of rows that are sorted by expert: half of each expert's last tile is empty."""
    a = launch.arguments
    padded = rows + a["num_experts"] * a["BLOCK_M"] / 2
    units = padded / a["BLOCK_M"] * -(-width // a["BLOCK_N"])
    per_row = 2.0 * inner * width
    return Work(tensor_bytes(launch), rows * per_row, padded * per_row, units)


def _weight(launch: Launch) -> Work:
    a = launch.arguments
    rows, area = a["x_ptr"].shape[0], float(a["width_x"]) * a["width_y"]
    padded = rows + a["offsets_ptr"].shape[0] * a["BLOCK_M"] / 2
    twice = tensor_bytes(launch, "x", "y") if a["DESCRIBED"] else 0.0  # descriptors of x_ptr and y_ptr
    return Work(tensor_bytes(launch) - twice, 2.0 * rows * area, 2.0 * padded * area)


def _attend(launch: Launch) -> Work:
    """Every token of every row is read once for all heads of a key head, a tile of them at a time; partial sums are
    written and read. Of the stages each tile of keys takes two, one for the block table that it waits for."""
    a = launch.arguments
    (tokens, heads, width), tiles = a["k_ptr"].shape, -(-a["group"] // a["BLOCK_H"])
    flops = 2.0 * tokens * heads * tiles * a["BLOCK_H"] * (width + a["VALUE_WIDTH"])
    once = tokens * heads * a["VALUE_WIDTH"] * a["v_ptr"].dtype.itemsize if a["SHARED"] else 0
    parts = a["parts_ptr"]
    again = 0 if parts is None else 4 * math.prod(parts.shape)
    stages = (launch.specialisation.options["num_stages"] + 1) // 2
    return Work(tensor_bytes(launch) - once + again, flops, trips=tokens * heads * tiles / a["BLOCK_T"], stages=stages)


def _rotate_latents(launch: Launch) -> Work:
    """Of queries, in and out, the rotated channels alone."""
    a = launch.arguments
    rows, heads, _ = a["q_ptr"].shape
    rotated, size = 2 * a["half"], a["q_ptr"].dtype.itemsize
    of_rows = rows * size * (2 * heads * rotated + 2 * (a["width"] + rotated))
    return Work(of_rows + tensor_bytes(launch, "slots_ptr", "cos_ptr", "sin_ptr", "norm_ptr"))


def _sample(launch: Launch) -> Work:
    """Of normal logits (docs/LOG.md counts others): one pass for the sums and one for what stays. Between these a pass
    into a list, whose loop stores as many bytes as it loads, and the list's own; for top_p two over the row first."""
    a = launch.arguments
    into_list, of_list = 2.0, 0.4
    cuts = {
        (False, False): (), (True, False): (into_list, of_list, 1), (False, True): (into_list, 2 + of_list, 1),
        (True, True): (into_list, 2 * of_list, 1),
    }  # fmt: skip
    return Work(tensor_bytes(launch), passes=(1, *cuts[a["TOP_K"], a["TOP_P"]]))


# What a launch has to do, where it is more than to read or write each of its tensors once.
WORK: dict[str, Callable[[Launch], Work]] = {
    "_gemm_kernel": lambda x: _product(x, x.arguments["x"].shape[0], x.arguments["inner"], x.arguments["width"]),
    "_gate_up_kernel": lambda x: _product(
        x, x.arguments["order_ptr"].shape[0], x.arguments["width"], 2 * x.arguments["width_f"]
    ),
    "_weight_kernel": _weight,
    "_attend_kernel": _attend,
    "_rotate_latents_kernel": _rotate_latents,
    "_sample_kernel": _sample,
    "_zero_skipped_kernel": lambda x: Work(4.0 * x.num_programs, trips=1),  # no row is skipped
}


def work_of(launch: Launch) -> Work:
    return WORK[launch.name](launch) if launch.name in WORK else Work(tensor_bytes(launch))


def floor_ms(num_bytes: float, flops: float) -> float:
    return max(num_bytes / COPY_BYTES_PER_S, flops / PRODUCT_FLOPS_PER_S) * 1e3


def _decode(case: Case, itemsize: int) -> tuple[float, float]:
    heads, kv_heads, width, value_width = DECODE_HEADS[case.mode]
    tokens, read = float(case.sizes["B"] * case.sizes["T"]), width + value_width if case.mode == "gqa" else width
    return itemsize * tokens * kv_heads * read, 2 * tokens * heads * (width + value_width)


def _head_flops(case: Case, passes: int) -> float:
    return 2.0 * passes * case.sizes["T"] * case.sizes["D"] * case.sizes["V"]


def _expert_flops(case: Case, matrices: int) -> float:
    """Of `matrices` D x F of its expert for every choice, and twice that for their gradients."""
    T, K, D, F = (case.sizes[letter] for letter in "TKDF")
    return 2.0 * matrices * T * K * D * F * (1 if case.mode == "fwd" else 3)


# (bytes, FLOPs) of what bench_<op>.py times as the floor.
FLOORS: dict[str, Callable[[Case, dict[str, int], int], tuple[float, float]]] = {
    "selective_logprobs": lambda x, n, s: (s * n["T"] * n["V"] * {"fwd": 1, "bwd": 2}[x.mode], 0),
    "linear_logprobs": lambda x, n, s: (0, _head_flops(x, 1 if x.mode == "fwd" else 4)),
    "linear_cross_entropy": lambda x, n, s: (0, _head_flops(x, 3)),
    "linear_grpo_loss": lambda x, n, s: (0, _head_flops(x, 3)),
    "group_advantages": lambda x, n, s: (16 * n["N"], 0),
    "grpo_loss": lambda x, n, s: (20 * n["N"] * n["L"], 0),
    "route_topk": lambda x, n, s: (12 * n["T"] * n["E"], 0),
    "grouped_gemm": lambda x, n, s: (0, _expert_flops(x, 2)),
    "moe_experts": lambda x, n, s: (0, _expert_flops(x, 3)),
    "sample_tokens": lambda x, n, s: (s * n["B"] * n["V"], 0),
    "decode_attention": lambda x, n, s: _decode(x, s),
    "decode_parts": lambda x, n, s: (sum(step_bytes(x.mode, n["B"], s)), 0),
}


def case_floor_ms(case: Case) -> float:
    """At the rates that were measured."""
    return floor_ms(*FLOORS[case.op](case, case.sizes, DTYPES[case.dtype].itemsize))
