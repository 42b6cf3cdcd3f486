"""Kernels as the machine gets them: compiled for an architecture without a GPU, and what stands in their code.

compile  a specialisation -> cubin -> `nvdisasm -c`, which is part of Triton's wheel
loops    a backward branch closes one; a loop without another inside is innermost, and the hot one of these is that
         with the most tensor-core work, or with the most bytes of global memory
counts   instructions, by pipe; bytes that a thread moves, and by accesses how wide; FLOPs of tensor cores
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.fake_gpu import Specialisation, usage_of

NVDISASM = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
WARP = 32

_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
_BRANCH = re.compile(r"`\((\.L_\S+)\)")
_REGISTER = re.compile(r"\bR(\d+)")

# Which pipe a warp instruction takes, and how many of its lanes a multiprocessor has: the table of throughputs of the
# CUDA C++ Programming Guide for compute capability 9.0. What is in no list shares the 128 lanes of issue alone.
LANES = {"alu": 64, "fp64": 64, "special": 16, "shuffle": 32}
_PIPES = {
    "special": ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"),
    "shuffle": ("SHFL",),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP"),
    "alu": ("IADD3", "ISETP", "LOP3", "SHF", "LEA", "SEL", "PRMT", "FMNMX", "FSETP", "FSEL", "IMNMX", "VIADD", "PLOP3",
            "VIMNMX", "IABS", "ISCADD", "F2FP", "P2R", "R2P", "LOP"),
}  # fmt: skip
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes}
_GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
_SHARED = ("LDS", "STS", "LDGSTS", "LDSM", "STSM", "ATOMS")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with what follows its points: LDG.E.128
    operands: str
    label: str | None  # to which it branches
    guarded: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """That a thread moves between registers or shared memory and memory."""
        parts = self.opcode.split(".")[1:]
        if "M88" in parts or "MT88" in parts:  # matrices of 8 x 8 numbers of 16 bits, 1, 2 or 4 of them
            return 4 * int(self.opcode[-1]) if self.opcode[-1].isdigit() else 4
        wide = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
        return next((wide[part] for part in reversed(parts) if part in wide), 4)

    @property
    def tensor_shape(self) -> tuple[int, int, int] | None:
        if self.name == "HGMMA" and (found := re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode)):
            return int(found[1]), int(found[2]), int(found[3])
        if self.name == "HMMA" and (found := re.search(r"\.16(8)(8|16)\b", self.opcode)):
            return 16, int(found[1]), int(found[2])
        return None

    def tensor_flops(self) -> float:
        """By the warp that issues it: four of them share a product of 64 rows."""
        if self.tensor_shape is None:
            return 0.0
        m, n, k = self.tensor_shape
        return 2.0 * m * n * k / (4 if self.name == "HGMMA" else 1)

    def shared_bytes(self) -> float:
        """That a warp moves through shared memory."""
        if self.name == "HGMMA" and self.tensor_shape is not None:
            m, n, k = self.tensor_shape
            rows = m if re.match(r"R\d+, gdesc", self.operands) else 0  # else they are in registers
            return 2.0 * (rows + n) * k / 4
        return WARP * self.bytes if self.name in _SHARED else 0.0

    def registers_read(self) -> set[int]:
        stores = self.name in ("STG", "STS", "RED", "BAR", "LDGSTS", "STSM")
        parts = self.operands if stores else self.operands.partition(",")[2]
        found = set()
        for number in map(int, _REGISTER.findall(parts)):
            span = max(1, self.bytes // 4) if stores else 2 if ".64" in parts or "WIDE" in self.opcode else 1
            found |= set(range(number, number + span))
        return found

    def registers_written(self) -> set[int]:
        first = _REGISTER.match(self.operands)
        if first is None or self.name in ("STG", "STS", "LDGSTS"):
            return set()
        span = max(1, self.bytes // 4) if self.name in ("LDG", "LDS", "LDSM") else 1
        return set(range(int(first[1]), int(first[1]) + span))


@dataclass(frozen=True)
class Block:
    """Some instructions, in their order: a loop, or what is outside."""

    code: tuple[Instruction, ...]
    depth: int = 0  # loops around it

    def __len__(self) -> int:
        return len(self.code)

    def count(self, *names: str) -> int:
        return sum(x.name in names for x in self.code)

    @cached_property
    def pipes(self) -> Counter[str]:
        return Counter(_PIPE_OF[x.name] for x in self.code if x.name in _PIPE_OF)

    @cached_property
    def global_bytes(self) -> int:
        """Of a thread, into and out of global memory by instructions of its own."""
        return sum(x.bytes for x in self.code if x.name in _GLOBAL)

    @cached_property
    def wide_share(self) -> float | None:
        """Of these bytes, those of 128-bit accesses."""
        wide = sum(x.bytes for x in self.code if x.name in _GLOBAL and x.bytes == 16)
        return wide / self.global_bytes if self.global_bytes else None

    @cached_property
    def tensor_flops(self) -> float:
        """Of a warp."""
        return sum(x.tensor_flops() for x in self.code)

    @cached_property
    def shared_bytes(self) -> float:
        """Of a warp, in and out."""
        return sum(x.shared_bytes() for x in self.code) + self.tma_bytes

    @cached_property
    def l2_bytes(self) -> float:
        """Of a warp, by wide accesses and copies: narrow ones are few, or many lanes read one number."""
        own = sum(WARP * x.bytes for x in self.code if x.name in _GLOBAL and x.bytes == 16)
        return own + self.tma_bytes

    @cached_property
    def tma_bytes(self) -> float:
        """Of a warp: the operands of its products, each once."""
        return sum(x.shared_bytes() for x in self.code if x.name == "HGMMA") / 2 if self.uses_tma else 0.0

    @property
    def uses_tma(self) -> bool:
        return self.count("UTMALDG", "UBLKCP") > 0

    @property
    def is_async(self) -> bool:
        return self.uses_tma or self.count("LDGSTS") > 0

    @property
    def divisions(self) -> int:
        """Of integers: a routine that is called, or I2F of a divisor and the reciprocal of it."""
        reciprocals = sum(x.opcode.startswith("MUFU.RCP") for x in self.code)
        return self.count("CALL") + min(reciprocals, sum(x.opcode.startswith("I2F") for x in self.code))

    @cached_property
    def mma_chain(self) -> int:
        """The most products of a warp, by mma, that each add to what the one before it gave."""
        length: dict[int, int] = {}
        for x in self.code:
            here = max((length.get(register, 0) for register in x.registers_read()), default=0)
            here += x.name == "HMMA"
            written = x.registers_written()
            for register in {y + more for y in written for more in range(4)} if x.name == "HMMA" else written:
                length[register] = here if x.name == "HMMA" else 0
        return max(length.values(), default=0)

    @cached_property
    def async_cover(self) -> int:
        """Instructions from an asynchronous copy to the next wait for copies, in this iteration or the next."""
        waits = [place for place, x in enumerate(self.code) if x.name in ("DEPBAR", "SYNCS")]
        copies = [place for place, x in enumerate(self.code) if x.name in ("LDGSTS", "UTMALDG")]
        if not waits or not copies:
            return len(self)
        return min((wait - copies[-1]) % len(self) for wait in waits)

    def waits(self) -> tuple[int, int]:
        """(loads of one iteration that follow from each other; instructions from the last of them to its first use).

        Asynchronous copies are waited for elsewhere, and counted by stages.
        """
        level: dict[int, int] = {}
        loads: dict[int, tuple[int, int]] = {}  # register -> (where it was loaded, level)
        hops, cover = 0, len(self.code)
        for place, x in enumerate((*self.code, *self.code)):
            again = place >= len(self.code)
            for register in x.registers_read() & loads.keys():
                where, its = loads.pop(register)
                if its == hops:
                    cover = min(cover, place - where)
            if again:
                continue
            here = max((level.get(register, 0) for register in x.registers_read()), default=0)
            for register in x.registers_written():
                loads.pop(register, None)
                level[register] = here
                if x.name == "LDG":
                    level[register] = here + 1
                    if here + 1 > hops:
                        hops, cover = here + 1, len(self.code)
                    loads[register] = place, here + 1
        return hops, cover


@dataclass(frozen=True)
class Code:
    """A kernel of an architecture."""

    registers: int
    spilled_bytes: int
    shared_bytes: int  # of a block
    warps: int
    stages: int
    whole: Block
    loops: tuple[Block, ...]  # innermost ones that move data or multiply
    outside: Block  # what is in none of these
    around: Block  # of this, what is in a loop around the hot one: a program that walks through tiles

    @property
    def hot(self) -> Block | None:
        return max(self.loops, key=lambda x: (x.tensor_flops, x.global_bytes), default=None)

    @property
    def wide_share(self) -> float | None:
        return (self.hot or self.whole).wide_share

    @property
    def tensor_ops(self) -> dict[str, int]:
        """Of an iteration, by shape."""
        found = Counter(
            f"{x.name} {'x'.join(map(str, x.tensor_shape))}" for x in (self.hot or self.whole).code if x.tensor_shape
        )
        return dict(found)


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Of `nvdisasm -c`: instructions, and where the labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            branch = _BRANCH.search(found[3])
            code.append(Instruction(found[2], found[3], branch[1] if branch else None, bool(found[1])))
    return code, labels


def loops_of(code: Sequence[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each; of those that begin together, the longest."""
    ends: dict[int, int] = {}
    for place, x in enumerate(code):
        first = labels.get(x.label or "", place + 1)
        # The last branch of a kernel is one to itself, which nothing reaches.
        if x.name == "BRA" and first < place:
            ends[first] = place
    return sorted(ends.items())


def blocks_of(code: Sequence[Instruction], labels: dict[str, int]) -> tuple[tuple[Block, ...], Block, Block]:
    """Innermost loops that move data or multiply, everything else, and of that what is in a loop around one of them.

    A loop that is unrolled is followed by one for what is left: of two with the same depth, that with less than half
    the work is taken for such a rest.
    """
    spans = loops_of(code, labels)
    innermost = [x for x in spans if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    found = []
    for first, last in innermost:
        depth = sum(a <= first and last <= b for a, b in spans)
        block = Block(tuple(code[first : last + 1]), depth)
        if block.global_bytes or block.tensor_flops or block.uses_tma:
            found.append((first, last, block))
    kept = [
        (first, last, x)
        for first, last, x in found
        if all(2 * x.global_bytes >= y.global_bytes and 2 * x.tensor_flops >= y.tensor_flops for _, _, y in found
               if y.depth == x.depth)
    ]  # fmt: skip
    inside = {place for first, last, _ in found for place in range(first, last + 1)}
    around = {
        place for a, b in spans if any(a <= first and last <= b for first, last, _ in kept) for place in range(a, b + 1)
    }
    rest = [place for place in range(len(code)) if place not in inside]
    outside, walked = Block(tuple(code[x] for x in rest)), Block(tuple(code[x] for x in rest if x in around))
    return tuple(x for _, _, x in kept), outside, walked


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


def compile_special(special: Specialisation, arch: int = 90) -> Code:
    compiled = triton.compile(special.source, target=GPUTarget("cuda", arch, WARP), options=special.options)
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    usage = usage_of(cubin, metadata.shared)
    code, labels = parse(disassemble(cubin))
    loops, outside, around = blocks_of(code, labels)
    return Code(
        usage.registers, usage.spilled_bytes, usage.shared_bytes, metadata.num_warps, metadata.num_stages,
        Block(tuple(code)), loops, outside, around,
    )  # fmt: skip
