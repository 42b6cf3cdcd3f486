"""Machine code is read right, and what the model of bench/limits.py makes of it."""

import pytest

from bench.limits import Code, Work, blocks_per_multiprocessor, clocks_of, modelled
from bench.machine_code import Block, blocks_of, parse

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
