"""What machine code allows each GPU case of bench/cases.py on an H200: modelled, without a GPU (bench/limits.py).

    python bench/modelled.py [op]

Each case, then its kernels as they are launched:

    us, share, limit   modelled time, the floor's share of it, and what sets it; behind the kernel what comes next
    regs, blk, warps   registers of a thread, blocks that a multiprocessor takes, warps of a block
    wide               of the bytes of the hot loop those of 128-bit accesses
    loop, /el          instructions of the hot loop, and by element; its barriers, divisions of integers, tensor-core ops
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
from bench.machine_code import Code, compile_launch  # noqa: E402
from bench.production import CALLS, Launch, record  # noqa: E402


def _product(launch: Launch, rows: int, inner: int, width: int) -> Work:
    """Of rows that are sorted by expert: half of each expert's last tile is empty."""
    a = launch.arguments
    padded = rows + a["num_experts"] * a["BLOCK_M"] / 2
    units = padded / a["BLOCK_M"] * -(-width // a["BLOCK_N"])
    per_row = 2.0 * inner * width
    return Work(launch.tensor_bytes(), rows * per_row, padded * per_row, units)


def _weight(launch: Launch) -> Work:
    a = launch.arguments
    rows, area = a["order_ptr"] if a["order_ptr"] is not None else a["x_ptr"], float(a["width_x"]) * a["width_y"]
    padded = len(rows) + len(a["offsets_ptr"]) * a["BLOCK_M"] / 2
    return Work(launch.tensor_bytes(), 2.0 * len(rows) * area, 2.0 * padded * area)


def _attend(launch: Launch) -> Work:
    """Every token of every row is read once for all heads of a key head, 16 of them at a time."""
    a = launch.arguments
    (tokens, heads, width), tiles = a["k_ptr"].shape, -(-a["group"] // a["BLOCK_H"])
    flops = 2.0 * tokens * heads * tiles * a["BLOCK_H"] * (width + a["value_width"])
    return Work(launch.tensor_bytes(), flops, trips=tokens * heads * tiles / a["BLOCK_T"])


def _sample(launch: Launch) -> Work:
    """One pass for the sums; with a cut one for each bit of a logit, and one for what stays."""
    a = launch.arguments
    bits = 32 - a["SHIFT"]
    cuts = {(False, False): (), (True, False): (bits, 1), (False, True): (bits, 1), (True, True): (bits, 1, bits, 1)}
    return Work(launch.tensor_bytes(), passes=(1, *cuts[a["TOP_K"], a["TOP_P"]]))


# What a launch has to do, where it is more than to read or write each of its tensors once.
WORK: dict[str, Callable[[Launch], Work]] = {
    "_gemm_kernel": lambda x: _product(x, len(x.arguments["x_ptr"]), x.arguments["inner"], x.arguments["width"]),
    "_gate_up_kernel": lambda x: _product(
        x, len(x.arguments["order_ptr"]), x.arguments["width"], 2 * x.arguments["width_f"]
    ),
    "_inner_gradient_kernel": lambda x: _product(
        x, len(x.arguments["order_ptr"]), x.arguments["width"], x.arguments["width_f"]
    ),
    "_weight_kernel": _weight,
    "_attend_kernel": _attend,
    "_sample_kernel": _sample,
}


def work_of(launch: Launch) -> Work:
    return WORK[launch.kernel](launch) if launch.kernel in WORK else Work(launch.tensor_bytes())


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
    kernels: list[Kernel]
    vendor_ms: float

    @property
    def ms(self) -> float:
        return self.vendor_ms + sum(x.times * x.model.ms for x in self.kernels)


def floor_ms(num_bytes: float, flops: float) -> float:
    return max(num_bytes / COPY_BYTES_PER_S, flops / PRODUCT_FLOPS_PER_S) * 1e3


_codes: dict[str, Code] = {}


def code_of(launch: Launch) -> Code:
    if launch.specialisation not in _codes:
        _codes[launch.specialisation] = compile_launch(launch)
    return _codes[launch.specialisation]


def row_of(case: Case) -> Row:
    call = record(case)
    together: dict[str, list[Launch]] = {}
    for launch in call.launches:
        together.setdefault(f"{launch.grid} {launch.tensor_bytes()} {launch.specialisation}", []).append(launch)
    kernels = []
    for same in together.values():
        code, work = code_of(same[0]), work_of(same[0])
        kernels.append(Kernel(same[0], code, work, modelled(code, work, same[0].programs), len(same)))
    return Row(case, kernels, call.vendor_flops / PRODUCT_FLOPS_PER_S * 1e3)


def per_element(kernel: Kernel) -> str:
    """Instructions of the hot loop (of the kernel, without one) by numbers of the type of its first pointer."""
    block = kernel.code.hot or kernel.code.whole
    kind = next(kind for kind in kernel.launch.signature.values() if kind.startswith("*")).strip("*")
    size = int("".join(x for x in kind if x.isdigit())) / 8
    return "-" if block.tensor_flops or not block.global_bytes else f"{len(block) / (block.global_bytes / size):.1f}"


COLUMNS = ("us", "share", "limit", "regs", "blk", "warps", "spill", "wide", "loop", "/el", "bar", "div")
WIDTHS = (9, 6, 8, 5, 4, 6, 6, 5, 5, 6, 4, 4)


def show(row: Row) -> str:
    lines = [f"\n{row.case.op}  {row.case.name}: {row.ms:.3f} ms modelled, of it the vendor's products {row.vendor_ms:.3f}"]
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
            + f"  {x.times} x {x.launch.kernel}{tensor}: {rest}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What machine code allows on an H200 (modelled).")
    parser.add_argument("op", nargs="?", choices=list(CALLS), help="all without it")
    asked: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    for case in CASES:
        if case.device == "cuda" and case.op in CALLS and asked.op in (None, case.op):
            print(show(row_of(case)), flush=True)


if __name__ == "__main__":
    main()
