"""What machine code allows each GPU case of bench/cases.py on an H200: modelled, without a GPU (bench/limits.py).

    python bench/modelled.py [op]

Each case, then its kernels as they are launched:

    us, share, limit   modelled time, the floor's share of it, and what sets it; behind the kernel what comes next
    regs, blk, warps   registers of a thread, blocks that a multiprocessor takes, warps of a block
    wide               of the bytes of the hot loop those of 128-bit accesses
    loop, /el          instructions of the hot loop, and by element; then its barriers and divisions of integers
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench.cases import CASES, Case  # noqa: E402
from bench.limits import COPY_BYTES_PER_S, PRODUCT_FLOPS_PER_S, Modelled, Work, modelled  # noqa: E402
from bench.machine_code import Code, compile_special  # noqa: E402
from bench.production import CALLS, Call, record, tensor_bytes  # noqa: E402
from tests.kernels.fake_gpu import Launch, Specialisation  # noqa: E402

# torch's grouped product, whose 657 TFLOP/s of 2048 rows an expert were 645 of 1024 and 572 of 512 (h200-all.json).
GROUPED_FLOPS_PER_S, GROUPED_TILE = 680e12, 128
OWN = ("grouped_gemm", "moe_experts")  # ops that have products of torch's, and of their own


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
    """Every token of every row is read once for all heads of a key head, 16 of them at a time."""
    a = launch.arguments
    (tokens, heads, width), tiles = a["k_ptr"].shape, -(-a["group"] // a["BLOCK_H"])
    flops = 2.0 * tokens * heads * tiles * a["BLOCK_H"] * (width + a["value_width"])
    once = tokens * heads * a["value_width"] * a["v_ptr"].dtype.itemsize if a["SHARED"] else 0
    return Work(tensor_bytes(launch) - once, flops, trips=tokens * heads * tiles / a["BLOCK_T"])


def _sample(launch: Launch) -> Work:
    """One pass for the sums; with a cut one for each bit of a logit, and one for what stays."""
    a = launch.arguments
    bits = 32 - a["SHIFT"]
    cuts = {(False, False): (), (True, False): (bits, 1), (False, True): (bits, 1), (True, True): (bits, 1, bits, 1)}
    return Work(tensor_bytes(launch), passes=(1, *cuts[a["TOP_K"], a["TOP_P"]]))


# What a launch has to do, where it is more than to read or write each of its tensors once.
WORK: dict[str, Callable[[Launch], Work]] = {
    "_gemm_kernel": lambda x: _product(x, x.arguments["x"].shape[0], x.arguments["inner"], x.arguments["width"]),
    "_gate_up_kernel": lambda x: _product(
        x, x.arguments["order_ptr"].shape[0], x.arguments["width"], 2 * x.arguments["width_f"]
    ),
    "_weight_kernel": _weight,
    "_attend_kernel": _attend,
    "_sample_kernel": _sample,
    "_zero_skipped_kernel": lambda x: Work(4.0 * x.num_programs, trips=1),  # no row is skipped
}


def work_of(launch: Launch) -> Work:
    return WORK[launch.name](launch) if launch.name in WORK else Work(tensor_bytes(launch))


@dataclass(frozen=True)
class Kernel:
    launch: Launch
    code: Code
    work: Work
    model: Modelled
    times: int  # in one call of the op

    @property
    def floor_ms(self) -> float:
        return floor_ms(self.work.bytes, self.work.flops)


@dataclass(frozen=True)
class Row:
    case: Case
    own: bool
    kernels: list[Kernel]
    vendor_ms: float

    @property
    def ms(self) -> float:
        return self.vendor_ms + sum(x.times * x.model.ms for x in self.kernels)


def floor_ms(num_bytes: float, flops: float) -> float:
    return max(num_bytes / COPY_BYTES_PER_S, flops / PRODUCT_FLOPS_PER_S) * 1e3


_codes: dict[str, Code] = {}


def code_of(special: Specialisation) -> Code:
    if special.key not in _codes:
        _codes[special.key] = compile_special(special)
    return _codes[special.key]


def vendor_ms(call: Call) -> float:
    """Of cuBLAS at its measured rate; of torch's grouped product at its own, with half a tile empty for each expert."""
    grouped = sum(flops * (1 + GROUPED_TILE / 2 / rows) for flops, rows in call.grouped_flops)
    return (call.product_flops / PRODUCT_FLOPS_PER_S + grouped / GROUPED_FLOPS_PER_S) * 1e3


def row_of(case: Case, *, own: bool = False) -> Row:
    call = record(case, own=own)
    together: dict[str, list[Launch]] = {}
    for launch in call.launches:
        key = f"{launch.grid} {tensor_bytes(launch)} {launch.specialisation.key}"
        together.setdefault(key, []).append(launch)
    kernels = []
    for same in together.values():
        code, work = code_of(same[0].specialisation), work_of(same[0])
        kernels.append(Kernel(same[0], code, work, modelled(code, work, same[0].num_programs), len(same)))
    return Row(case, own, kernels, vendor_ms(call))


def per_element(kernel: Kernel) -> str:
    """Instructions of the hot loop (of the kernel, without one) by numbers of the type of its first pointer."""
    block = kernel.code.hot or kernel.code.whole
    kind = next(kind for kind in kernel.launch.specialisation.signature.values() if kind.startswith("*")).strip("*")
    size = int("".join(x for x in kind if x.isdigit())) / 8
    return "-" if block.tensor_flops or not block.global_bytes else f"{len(block) / (block.global_bytes / size):.1f}"


COLUMNS = ("us", "share", "limit", "regs", "blk", "warps", "spill", "wide", "loop", "/el", "bar", "div")
WIDTHS = (9, 6, 8, 5, 4, 6, 6, 5, 5, 6, 4, 4)


def show(row: Row) -> str:
    name = f"{row.case.op}  {row.case.name}" + (", products of our own" if row.own else "")
    lines = [f"\n{name}: {row.ms:.3f} ms modelled, products of the vendor {row.vendor_ms:.3f}"]
    lines.append("".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS)) + "  kernel: what else it takes")
    for x in row.kernels:
        hot, code = x.code.hot or x.code.whole, x.code
        cells = (
            f"{x.model.ms * 1e3:.1f}", f"{x.floor_ms / x.model.ms:.0%}", x.model.limit, code.registers, x.model.blocks,
            code.warps, code.spilled_bytes, "-" if code.wide_share is None else f"{code.wide_share:.0%}", len(hot),
            per_element(x), hot.count("BAR"), hot.divisions,
        )  # fmt: skip
        others = sorted(x.model.clocks.items(), key=lambda item: -item[1])[1:4]
        rest = ", ".join(f"{name} {clocks / x.model.clocks[x.model.limit]:.0%}" for name, clocks in others)
        tensor = "".join(f"  {count} {shape}" for shape, count in code.tensor_ops.items())
        lines.append(
            "".join(str(cell).rjust(width) for cell, width in zip(cells, WIDTHS))
            + f"  {x.times} x {x.launch.name}{tensor}: {rest}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What machine code allows on an H200 (modelled).")
    parser.add_argument("op", nargs="?", choices=list(CALLS), help="all without it")
    asked: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    for case in CASES:
        if case.device == "cuda" and case.op in CALLS and asked.op in (None, case.op):
            for own in (False, True) if case.op in OWN else (False,):
                print(show(row_of(case, own=own)), flush=True)


if __name__ == "__main__":
    main()
