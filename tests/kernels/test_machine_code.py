"""Machine code is read right, and that of production's kernels allows what is asked of them on an H200.

The gates compile what the GPU cases of bench/cases.py launch (a minute of processor time the first time, then Triton's
cache has it). A kernel that changed: `python bench/modelled.py --write && python bench/report.py`.
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton import knobs

from bench.cases import CASES, Case
from bench.limits import Code, Work, blocks_per_multiprocessor, clocks_of, modelled
from bench.machine_code import Block, blocks_of, parse
from bench.modelled import RESULTS, Kernel, Row, kernel_of, row_of, rows, summary
from bench.production import DECODE_HEADS, recorded
from r1fast_kernels import decode_attention, dispatch, moe_experts_rows
from tests.kernels.fake_gpu import Launch
from tests.kernels.launch_cases import BF16, new

pytestmark = pytest.mark.skipif(dispatch.INTERPRETING, reason="the interpreter compiles nothing")

LISTING = """
_some_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E R9, desc[UR4][R8.64] ;
.L_x_0:
        /*0020*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R10, desc[UR4][R2.64+0x10] ;
        /*0040*/                   IADD3 R2, P0, R2, 0x100, RZ ;
        /*0050*/                   FFMA R1, R5, R5, R1 ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
        /*0090*/                   STG.E.64 desc[UR4][R8.64], R1 ;
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   BRA `(.L_x_1);
"""


def code_of(listing: str, registers: int = 32, shared_bytes: int = 0, warps: int = 4, stages: int = 3) -> Code:
    code, labels = parse(listing)
    loops, outside, around = blocks_of(code, labels)
    return Code(registers, 0, shared_bytes, warps, stages, Block(tuple(code)), loops, outside, around)


def test_loops_and_what_they_move() -> None:
    code = code_of(LISTING)
    (loop,) = code.loops
    assert (len(loop), len(code.outside), len(code.around)) == (7, 5, 0)
    assert loop.global_bytes == 18 and loop.wide_share == 16 / 18
    assert (loop.pipes["special"], loop.pipes["alu"], loop.count("BAR"), loop.divisions) == (1, 1, 1, 0)
    # One load after another would be 2; the wide one is used two instructions later, the other one not at all.
    assert loop.waits() == (1, 3)
    clocks = clocks_of(loop, warps=4)
    assert clocks["issue"] == 7 and clocks["special"] == 8 and clocks["alu"] == 2 and clocks["l2"] == 4 * 32 * 16 / 34


def test_a_loop_around_another_and_the_rest_of_an_unrolled_one() -> None:
    load = "/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;\n"
    code = code_of(
        f".L_x_0:\n/*0000*/ MOV R1, R2 ;\n.L_x_1:\n{load}{load}{load}{load}/*0020*/ @P0 BRA `(.L_x_1) ;\n"
        f".L_x_2:\n{load}/*0030*/ @P1 BRA `(.L_x_2) ;\n/*0040*/ @P2 BRA `(.L_x_0) ;\n"
    )
    assert [len(x) for x in code.loops] == [5] and code.loops[0].depth == 2
    assert [x.name for x in code.around.code] == ["MOV", "BRA"]


@pytest.mark.parametrize(
    ("text", "divisions"),
    [("I2F.RP R1, R0 ;\n/*0010*/ MUFU.RCP R2, R1", 1), ("CALL.REL.NOINC `(some_division)", 1), ("MUFU.RCP R2, R1", 0)],
)
def test_division_of_integers(text: str, divisions: int) -> None:
    """By the reciprocal of a converted divisor, or by a routine; that of a float is none."""
    assert Block(tuple(parse(f"/*0000*/ {text} ;\n")[0])).divisions == divisions


def test_tensor_operations_by_shape() -> None:
    both = "/*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
    one = "/*0010*/ HGMMA.64x256x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;\n"
    mma = "/*0020*/ HMMA.16816.F32.BF16 R32, R8, R12, R32 ;\n"
    block = Block(tuple(parse(both + one + mma + mma)[0]))
    assert block.tensor_flops == (2 * 64 * 128 * 16 + 2 * 64 * 256 * 16) / 4 + 2 * 2 * 16 * 8 * 16
    assert block.shared_bytes == (2 * (64 + 128) * 16 + 2 * 256 * 16) / 4  # of a warp; 64 rows in registers
    assert block.mma_chain == 2


# Numbers of NVIDIA's occupancy calculator for compute capability 9.0.
@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "blocks"),
    [(128, 0, 8, 2), (129, 0, 8, 1), (32, 0, 8, 8), (33, 0, 8, 6), (255, 0, 4, 2), (16, 0, 2, 32), (32, 98_304, 8, 2),
     (32, 115_712, 8, 2), (32, 115_840, 8, 1), (32, 232_448, 8, 1)],
)  # fmt: skip
def test_blocks_per_multiprocessor(registers: int, shared_bytes: int, warps: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(code_of(LISTING, registers, shared_bytes, warps)) == blocks


def test_what_binds() -> None:
    """A kernel that only reads is bound by memory, and by what is under way once few of its blocks fit."""
    load = "".join(f"/*0010*/ LDG.E.128 R{8 + 4 * i}, desc[UR4][R2.64] ;\n" for i in range(4))
    uses = "".join(f"/*0020*/ FADD R1, R{8 + 4 * i}, R1 ;\n" for i in range(4))
    listing = f".L_x_0:\n{load}{uses}/*0030*/ @P0 BRA `(.L_x_0) ;\n"
    work = Work(bytes=4e9)
    many, few = (modelled(code_of(listing, registers), work, programs=13_200) for registers in (32, 255))
    assert (many.blocks, many.limit, few.blocks, few.limit) == (16, "memory", 2, "latency")
    assert many.ms == pytest.approx(4e9 / 4.2e12 * 1e3) and few.ms > many.ms
    # Half a wave more takes a whole one.
    tail = modelled(code_of(listing, 255), work, programs=132 * 2 * 50 + 132)
    assert tail.ms / few.ms == pytest.approx(51 / 50.5, rel=1e-3)


def test_passes_have_to_fit_the_loops() -> None:
    with pytest.raises(ValueError, match="got 2 passes over the bytes, expected one for each of 1 loops"):
        modelled(code_of(LISTING), Work(bytes=1e6, passes=(1, 2)), programs=1)


# Not `import`: ops are named like their modules.
GROUPED = "r1fast_kernels.grouped_gemm"

# ---- gates: what the GPU cases launch ----

# Targets of bench/cases.py whose case the machine code does not allow yet, with the margin that there is (Row.margin; 1
# is enough). One that closes, or grows, is to be written here.
GAPS = {
    "grpo_loss N1024-L1024-fp32-fwd+bwd": 0.64,
    "moe_experts T8192-D2048-F768-E128-K8-bf16-fwd": 0.99,
    "moe_experts T8192-D2048-F768-E128-K8-bf16-fwd own": 0.84,
    "moe_experts T16384-D2048-F768-E128-K8-bf16-fwd own": 0.90,
    "moe_experts T32768-D2048-F768-E128-K8-bf16-fwd own": 0.93,
}
# Kernels most of whose bytes go by accesses narrower than 128 bits: a few numbers for each token, choice or sample, or
# 8 bytes a thread, as 16 are fewer threads, and slower where nothing but latency counts.
NARROW = {
    "_advantages_kernel", "_count_kernel", "_grpo_kernel", "_order_kernel", "_prefix_kernel",
    "_rotate_and_write_kernel", "_rotate_latents_kernel", "_route_gradient_kernel", "_route_kernel",
    "_zero_skipped_kernel",
}  # fmt: skip
# (kernel, blocks a multiprocessor takes as in modelled.json, with Triton 3.6): everywhere else they are the same.
OTHER_BLOCKS = {("_expert_swiglu_gradient_kernel", 8, 9), ("_route_kernel", 8, 5)}


@cache
def production() -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {row.name: row for row in rows()}


def all_kernels() -> list[Kernel]:
    return [kernel for row in production().values() for kernel in row.kernels]


def gaps(found: Iterable[Row]) -> dict[str, float]:
    return {row.name: row.margin for row in found if row.margin is not None and row.margin < 1}


def narrow(found: Iterable[Kernel]) -> set[str]:
    return {x.launch.name for x in found if x.model.wide_bytes < 0.9 * x.work.bytes}


def dividing(found: Iterable[Kernel]) -> set[str]:
    return {x.launch.name for x in found if x.code.hot is not None and x.code.hot.divisions}


def spilling(found: Iterable[Kernel]) -> set[str]:
    return {x.launch.name for x in found if x.code.spilled_bytes}


def not_by_wgmma(found: Iterable[Kernel]) -> set[str]:
    """Products of tiles that are not m64n128k16 or wider."""
    products = [x for x in found if x.work.padded_flops]
    assert products
    return {
        x.launch.name for x in products
        if not any(op.name == "HGMMA" and op.tensor_shape is not None and op.tensor_shape[1] >= 128
                   for op in (x.code.hot or x.code.whole).code)
    }  # fmt: skip


def multiplying_twice(found: Iterable[Kernel]) -> set[str]:
    """Where groups of warps make the same product: Triton gives a product from which another follows to all of them."""
    loops = [(x, x.code.hot.tensor_flops * x.code.warps) for x in found if x.work.trips and x.code.hot is not None]
    return {x.launch.name for x, flops in loops if flops * x.work.trips > 1.02 * x.work.flops}


def factors_in_registers(found: Iterable[Kernel]) -> set[str]:
    """wgmma reads them while it runs; ptxas 12.9, which Triton 3.9 has, may give them away before (triton#11781)."""
    ops = ((x.launch.name, op) for x in found for op in x.code.whole.code if op.name == "HGMMA")
    return {name for name, op in ops if op.operands.split(", ")[1].startswith("R")}


def recorded_rows() -> dict[str, Any]:
    return {row["row"]: row for row in json.loads(RESULTS.read_text())["rows"]}


def is_recorded_triton() -> bool:
    return bool(json.loads(RESULTS.read_text())["triton"] == triton.__version__)


def other_blocks(found: Iterable[Row]) -> set[tuple[str, int, int]]:
    """(kernel, as recorded, now) where they differ."""
    pairs = [pair for row in found for pair in zip(recorded_rows()[row.name]["kernels"], row.kernels, strict=True)]
    assert all(old["name"] == x.launch.name for old, x in pairs)
    return {(x.launch.name, old["blocks"], x.model.blocks) for old, x in pairs if old["blocks"] != x.model.blocks}


def test_code_allows_what_is_asked() -> None:
    found = gaps(production().values())
    assert set(found) == set(GAPS)
    if is_recorded_triton():
        assert found == pytest.approx(GAPS, abs=0.015)


def test_memory_is_read_by_wide_loads() -> None:
    assert narrow(all_kernels()) == NARROW


def test_no_loop_divides() -> None:
    assert dividing(all_kernels()) == set()


def test_nothing_spills() -> None:
    assert spilling(all_kernels()) == set()


def by_loop(kernel: Kernel) -> list[float]:
    """Instructions of each loop, for each fp32 number that it loads or stores."""
    return [4 * len(loop) / loop.global_bytes for loop in kernel.code.loops]


# The sampler's first pass, that which lists (and stores), those that measure mass or number, the last.
SAMPLING = {"top_k=50": (12, 6, 16.5, 15), "top_p=0.95": (12, 6, 26.5, 15)}


@pytest.mark.parametrize("mode", SAMPLING)
def test_instructions_a_logit_of_sampling(mode: str) -> None:
    (kernel,) = production()[f"sample_tokens B256-V151936-fp32-{mode}"].kernels
    found = by_loop(kernel)
    assert len(found) == 4 and all(x <= most for x, most in zip(found, SAMPLING[mode])), found


# H, K, d, e of Gemma 2's 9B and 27B models, and of latents that 128 heads read.
CAPPED = {"9b": (16, 8, 256, 256), "27b": (32, 16, 128, 128), "mla128": DECODE_HEADS["mla128"]}


@pytest.mark.parametrize("heads", CAPPED.values(), ids=CAPPED)
def test_a_soft_cap_costs_no_block_of_a_decode_step(heads: tuple[int, int, int, int]) -> None:
    H, K, d, e = heads
    with recorded(own=True) as call:
        keys, lengths = new(4096, K, d, dtype=BF16), new(2, dtype=torch.int32)
        values = keys[..., :e] if K == 1 else new(4096, K, e, dtype=BF16)
        q, table = new(2, H, d, dtype=BF16), new(2, 128, dtype=torch.int32)
        for soft_cap in (None, 50.0):
            decode_attention(q, keys, values, table, lengths, scale=0.1, soft_cap=soft_cap)
    plain, capped = (kernel_of(launch) for launch in call.launches)
    count = [sum("MUFU" in x.opcode for x in kernel.code.whole.code) for kernel in (plain, capped)]
    assert count[0] < count[1], "the cap is not in the kernel"
    assert spilling([capped]) == multiplying_twice([capped]) == factors_in_registers([capped]) == set()
    assert blocks_per_multiprocessor(capped.code) == blocks_per_multiprocessor(plain.code)


def test_products_are_by_wgmma() -> None:
    assert not_by_wgmma(all_kernels()) == set()


def test_nothing_is_multiplied_twice() -> None:
    found = [x for x in all_kernels() if x.work.trips and x.work.flops]
    assert {x.launch.name for x in found} == {"_attend_kernel"} and multiplying_twice(found) == set()


def test_no_product_reads_registers_that_may_be_overwritten() -> None:
    assert factors_in_registers(all_kernels()) == set()


def test_modelled_json_is_of_these_kernels() -> None:
    """Numbers may move by 2% before they have to be written anew; what is compiled may not."""
    assert set(recorded_rows()) == set(production()), "run python bench/modelled.py --write && python bench/report.py"
    for name, old in recorded_rows().items() if is_recorded_triton() else ():
        row = summary(production()[name])
        assert row["limit"] == old["limit"] and row["share"] == pytest.approx(old["share"], rel=0.02), name
        for x, before in zip(row["kernels"], old["kernels"], strict=True):
            assert {"us": x.pop("us")} == pytest.approx({"us": before.pop("us")}, rel=0.02), (name, x["name"])
            assert x == before, f"{name}: run python bench/modelled.py --write && python bench/report.py"


def test_as_many_blocks_fit_with_any_triton() -> None:
    """What production needs most fits as often; test-triton36 runs this with the other one."""
    assert other_blocks(production().values()) == (set() if is_recorded_triton() else OTHER_BLOCKS)


# ---- each gate, on kernels that it has to refuse ----


def mutant(kernel: Any, old: str, new: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """A copy of a kernel's file in which `old` is `new`: its kernel."""
    source = Path(sys.modules[kernel.fn.__module__].__file__ or "").read_text()
    assert source.count(old) == 1, old
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("r1fast_kernels.mutant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setattr(dispatch, "register", lambda *_, **__: None)  # the operators exist already
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def combine_launch(width: int) -> Launch:
    """Of 512 tokens with 8 rows each."""
    with recorded(own=True) as call:
        moe_experts_rows.combine(
            new(4096, width, dtype=BF16), new(512, 8, dtype=torch.int32), new(8, dtype=torch.int32)
        )
    (launch,) = call.launches
    return launch


def with_kernel(launch: Launch, kernel: Any) -> Launch:
    return replace(launch, specialisation=replace(launch.specialisation, function=kernel))


def test_rows_that_no_vector_divides_are_noticed() -> None:
    even, odd = (kernel_of(combine_launch(width)) for width in (2048, 2047))
    assert narrow([even]) == set() and narrow([odd]) == {"_combine_kernel"}


def test_a_division_in_a_loop_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = moe_experts_rows._combine_kernel
    divides = mutant(
        kernel, "slot.to(tl.int64)[:, None]", "(slot // top_k).to(tl.int64)[:, None]", tmp_path, monkeypatch
    )
    launch = combine_launch(2048)
    assert dividing([kernel_of(launch)]) == set()
    assert dividing([kernel_of(with_kernel(launch, divides))]) == {"_combine_kernel"}


def test_an_instruction_more_a_logit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    (kernel,) = production()["sample_tokens B256-V151936-fp32-top_p=0.95"].kernels
    old = "tl.where(x >= least[6], weight, 0.0)"
    worse = mutant(
        kernel.launch.specialisation.function, old, old.replace("weight", "weight * x"), tmp_path, monkeypatch
    )
    assert by_loop(kernel_of(with_kernel(kernel.launch, worse)))[2] > SAMPLING["top_p=0.95"][2]


def test_factors_in_registers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = next(x.launch for x in all_kernels() if x.launch.name == "_gemm_kernel")
    doubles = mutant(launch.specialisation.function, "tl.dot(a, b, acc", "tl.dot(a + a, b, acc", tmp_path, monkeypatch)
    assert factors_in_registers([kernel_of(with_kernel(launch, doubles))]) == {"_gemm_kernel"}


def test_a_product_of_each_group_of_warps_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = production()["decode_attention B128-T2048-bf16-mla128"].kernels
    attend = kernel.launch.specialisation.function
    chained = mutant(attend, "            if start < length:\n", "            if True:\n", tmp_path, monkeypatch)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    assert multiplying_twice([kernel_of(with_kernel(kernel.launch, chained))]) == {"_attend_kernel"}


def large_case() -> Case:
    return next(x for x in CASES if x.op == "moe_experts" and x.device == "cuda" and x.sizes["T"] == 32_768)


def row_with(tile: Any, monkeypatch: pytest.MonkeyPatch) -> Row:
    """The largest case of moe_experts, forward, with products of our own by this tile."""
    monkeypatch.setattr(sys.modules[GROUPED], "BLOCKS_16_BIT", {1 << 62: tile})
    return row_of(large_case(), own=True)


def test_a_smaller_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = sys.modules[GROUPED].Blocks(64, 64, 64, 4, 3)
    row = row_with(tile, monkeypatch)
    assert gaps([row])[row.name] < GAPS[row.name] - 0.2
    assert not_by_wgmma(row.kernels) == {"_gate_up_kernel", "_gemm_kernel"}


def test_a_stage_that_costs_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sys.modules[GROUPED].BLOCKS_16_BIT[1 << 62]
    row = row_with(replace(usual, num_stages=usual.num_stages + 2), monkeypatch)
    assert other_blocks([row]) >= {("_gate_up_kernel", 2, 1)}


def test_registers_that_do_not_suffice_are_noticed() -> None:
    launch = next(x.launch for x in all_kernels() if x.launch.name == "_fold_kernel")
    special = launch.specialisation
    few = replace(launch, specialisation=replace(special, options=special.options | {"maxnreg": 24}))
    assert spilling([kernel_of(few)]) == {"_fold_kernel"}
