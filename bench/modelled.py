"""What machine code allows each GPU case of bench/cases.py on an H200: modelled, without a GPU (bench/limits.py).

    python bench/modelled.py [op]
    python bench/modelled.py --write     all, into bench/modelled.json, from which bench/report.py has its columns

Each case, then its kernels as they are launched:

    us, share, limit   modelled time, the floor's share of it, and what sets it; behind the kernel what comes next
    regs, blk, warps   registers of a thread, blocks that a multiprocessor takes, warps of a block
    wide               of the bytes of the hot loop those of 128-bit accesses
    loop, /el          instructions of the hot loop, and by element; then its barriers and divisions of integers
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench.cases import CASES, Case  # noqa: E402
from bench.limits import PRODUCT_FLOPS_PER_S, Modelled, Work, modelled  # noqa: E402
from bench.machine_code import Code, compile_special  # noqa: E402
from bench.production import CALLS, Call, record, tensor_bytes  # noqa: E402
from bench.work import case_floor_ms, floor_ms, work_of  # noqa: E402
from tests.kernels.fake_gpu import Launch, Specialisation  # noqa: E402

# torch's grouped product, whose 657 TFLOP/s of 2048 rows an expert were 645 of 1024 and 572 of 512 (h200-all.json).
GROUPED_FLOPS_PER_S, GROUPED_TILE = 680e12, 128
RESULTS = ROOT / "bench" / "modelled.json"
OWN = ("grouped_gemm", "moe_experts")  # ops that have products of torch's, and of their own


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
    own: bool  # with grouped products of our own where torch's would be taken
    kernels: list[Kernel]
    vendor_ms: float

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case.name}" + (" own" if self.own else "")

    @property
    def ms(self) -> float:
        return self.vendor_ms + sum(x.times * x.model.ms for x in self.kernels)

    @property
    def share(self) -> float:
        """Of the floor, at best."""
        return case_floor_ms(self.case) / self.ms

    @property
    def limit(self) -> str:
        """What binds the kernel that takes most of the time."""
        each = [(x.times * x.model.ms, x.model.limit) for x in self.kernels]
        return max([*each, (self.vendor_ms, "products of the vendor")])[1]

    @property
    def margin(self) -> float | None:
        """What the limits other than memory allow, over what the code has to allow for the case's target; None: no
        target that is a share of the floor.

        That is 1.3 times the share that is asked; of the head's ops, whose floor is products that are not ours, half of
        the way from the asked share to all of it.
        """
        floor = case_floor_ms(self.case)
        targets = [x for x in self.case.targets if x.measure in ("fraction", "ms")]
        asked = [x.bound if x.measure == "fraction" else floor / x.bound for x in targets]
        if not asked:
            return None
        allowed = floor / (self.vendor_ms + sum(x.times * x.model.ms_but_memory for x in self.kernels))
        of_products = self.case.op.startswith("linear_")
        return allowed / ((1 + max(asked)) / 2 if of_products else 1.3 * max(asked))


_codes: dict[tuple[Any, str], Code] = {}


def code_of(special: Specialisation) -> Code:
    key = special.function, special.key
    if key not in _codes:
        _codes[key] = compile_special(special)
    return _codes[key]


def kernel_of(launch: Launch, times: int = 1) -> Kernel:
    code, work = code_of(launch.specialisation), work_of(launch)
    return Kernel(launch, code, work, modelled(code, work, launch.num_programs), times)


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
    kernels = [kernel_of(same[0], len(same)) for same in together.values()]
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
    margin = "" if row.margin is None else f", {row.margin:.2f} of what its target needs"
    lines = [
        f"\n{row.name}: {row.ms:.3f} ms modelled, of it products of the vendor {row.vendor_ms:.3f}; "
        f"{row.share:.0%} of the floor{margin}",
        "".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS)) + "  kernel: what else it takes",
    ]
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


def rows(op: str | None = None) -> Iterator[Row]:
    for case in CASES:
        if case.device == "cuda" and case.op in CALLS and op in (None, case.op):
            for own in (False, True) if case.op in OWN else (False,):
                yield row_of(case, own=own)


def summary(row: Row) -> dict[str, Any]:
    """For modelled.json."""
    return {
        "row": row.name, "ms": round(row.ms, 4), "share": round(row.share, 3), "limit": row.limit,
        "kernels": [
            {
                "name": x.launch.name, "times": x.times, "us": round(x.model.ms * 1e3, 1), "limit": x.model.limit,
                "registers": x.code.registers, "blocks": x.model.blocks, "spilled": x.code.spilled_bytes,
                "per_element": per_element(x), "tensor": x.code.tensor_ops,
            }
            for x in row.kernels
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What machine code allows on an H200 (modelled).")
    parser.add_argument("op", nargs="?", choices=list(CALLS), help="all without it")
    parser.add_argument("--write", action="store_true", help=f"{RESULTS.name}, of all ops; then bench/report.py")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = []
    for row in rows(None if asked.write else asked.op):
        print(show(row), flush=True)
        found.append(summary(row))
    if asked.write:
        text = json.dumps({"triton": triton.__version__, "rows": found}, indent=1)
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
