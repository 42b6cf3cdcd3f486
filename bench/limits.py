"""What a kernel's machine code allows on an H200: its time at best, and what limits it. A model, not a measurement.

    time = waves x units of a multiprocessor x max(clocks of each resource, clocks of one unit / blocks side by side)

A unit is a program, or a tile of a program that walks through several. Resources of a multiprocessor, by the clock:

    issue    4 warp instructions                            tensor   83% of 4096 FLOPs of 16-bit factors; 62% by mma
    alu      64 lanes: integers, comparisons, min and max   shared   128 bytes: loads, stores, copies in, wgmma operands
    special  16 lanes: exponentials, reciprocals            memory   bytes at the rate of a copy
    shuffle  32 lanes                                       l2       34 bytes of wide loads, stores and copies

Lanes are those of the CUDA C++ Programming Guide (arithmetic throughput, compute capability 9.0); sizes of registers,
shared memory and threads its table of technical specifications. mma.sync at 62% of wgmma's peak, and latencies without
load, are measured in arXiv:2402.13499. The rest was measured on an H200 (docs/benchmarks.md): copies of 4.2 TB/s,
products of 8192 x 8192 x 8192 at 790 TFLOP/s; and L2, which gives at most 5120 bytes a clock to 132 multiprocessors:
products by tiles of 128 x 128, which read a byte for 64 FLOPs, reached 88% of that.

`latency`: one unit's own clocks over the blocks that stand beside each other. A unit waits for loads that are used
soon after they were issued, for loads that need one another, for asynchronous copies that are not far enough ahead, at
barriers, and for products by mma that add to each other. By Little's law this is the limit of bytes in flight.
"""

from dataclasses import dataclass, replace

from bench.machine_code import LANES, WARP, Block, Code

MULTIPROCESSORS = 132
CLOCK = 1.755e9  # that an H200 holds under load; its highest is 1.98e9
COPY_BYTES_PER_S = 4.2e12
PRODUCT_FLOPS_PER_S = 790e12
MMA_SHARE = 0.62
SHARED_BYTES, L2_BYTES, ISSUED = 128, 34, 4

# What tensor cores do in a clock: of 4096 FLOPs 83%, as power limits them.
TENSOR_FLOPS = PRODUCT_FLOPS_PER_S / MULTIPROCESSORS / CLOCK

REGISTERS, SHARED_MEMORY, RESERVED, THREADS, BLOCKS = 65_536, 228 * 1024, 1024, 2048, 32

L2_CLOCKS, BUSY_L2_CLOCKS = 270, 600  # arXiv:2402.13499; what a tile of a product waits for, which others read too
MEMORY_CLOCKS = 1400  # 480 without load; 800 ns where all bandwidth is used
DEPENDENT = 2  # clocks between instructions of a warp alone
BARRIER_CLOCKS = 30
MMA_CLOCKS = 60  # from one mma to the next that adds to it: 33 of its own, and its factors come from shared memory


@dataclass(frozen=True)
class Work:
    """What a launch has to do. Everything but bytes has a default: units are programs, and nothing multiplies."""

    bytes: float  # through memory, each once
    flops: float = 0.0  # useful ones
    padded_flops: float = 0.0  # with rows that fill up tiles
    units: float = 0.0
    trips: float = 0.0  # of the hot loop, in all units; 0: from FLOPs or bytes
    passes: tuple[float, ...] = ()  # of each loop over the bytes; empty: one, by the hot loop alone
    stages: int = 0  # of its copies, where those that wait for an index have fewer than the launch says; 0: those


@dataclass(frozen=True)
class Modelled:
    ms: float
    limit: str  # that binds
    blocks: int  # a multiprocessor takes
    clocks: dict[str, float]  # of a multiprocessor, by resource
    wide_bytes: float  # by 128-bit accesses and copies

    @property
    def ms_but_memory(self) -> float:
        """As if memory were free: how far from binding everything else is."""
        return max(each for name, each in self.clocks.items() if name != "memory") / CLOCK * 1e3


def blocks_per_multiprocessor(code: Code) -> int:
    """Registers go to warps in units of 256, warps to blocks in fours; 1 KB of shared memory a block is CUDA's own."""
    warps = -(-code.warps // 4) * 4
    registers = -(-code.registers * WARP // 256) * 256 * warps
    shared = -(-(code.shared_bytes + RESERVED) // 128) * 128
    return min(REGISTERS // registers, SHARED_MEMORY // shared, THREADS // (WARP * code.warps), BLOCKS)


def clocks_of(block: Block, warps: int) -> dict[str, float]:
    """Of each resource, for the warps of a thread block to go through it once."""
    mma = sum(x.tensor_flops() for x in block.code if x.name == "HMMA")
    return {
        "issue": len(block) * warps / ISSUED,
        "tensor": ((block.tensor_flops - mma) + mma / MMA_SHARE) * warps / TENSOR_FLOPS,
        "shared": block.shared_bytes * warps / SHARED_BYTES,
        "l2": block.l2_bytes * warps / L2_BYTES,
        **{pipe: block.pipes[pipe] * warps * WARP / lanes for pipe, lanes in LANES.items()},
    }


def iteration_clocks(block: Block, code: Code) -> float:
    """Of one thread block alone, from one iteration to the next.

    Of n stages the copies of n - 1 are under way: what an iteration copies, the (n - 1)th after it waits for.
    """
    pace = max(DEPENDENT, code.warps / ISSUED)
    clocks = max(len(block) * pace, clocks_of(block, code.warps)["tensor"])
    clocks += block.mma_chain * MMA_CLOCKS + block.count("BAR") * BARRIER_CLOCKS
    busy, exposed = clocks, 0.0
    far = BUSY_L2_CLOCKS if block.count("HGMMA") else MEMORY_CLOCKS
    if block.is_async:
        exposed = max(0.0, far - (code.stages - 2) * busy - block.async_cover * pace)
    hops, cover = block.waits()
    if hops:
        exposed += (hops - 1) * L2_CLOCKS + max(0.0, MEMORY_CLOCKS - cover * pace)
    return busy + exposed


def trips_of(code: Code, work: Work, units: float) -> list[tuple[Block, float]]:
    """Each loop with its iterations in a unit: from the bytes, or the FLOPs, that are its work."""
    if code.hot is None:
        return []
    if work.trips:
        return [(code.hot, work.trips / units)]
    if code.hot.tensor_flops and work.padded_flops:
        return [(code.hot, work.padded_flops / (units * code.hot.tensor_flops * code.warps))]
    loops = code.loops if work.passes else (code.hot,)
    passes = work.passes or (1.0,)
    if len(loops) != len(passes):
        raise ValueError(f"got {len(passes)} passes over the bytes, expected one for each of {len(loops)} loops")
    threads = WARP * code.warps
    return [(loop, n * work.bytes / (units * loop.global_bytes * threads)) for loop, n in zip(loops, passes)]


def modelled(code: Code, work: Work, programs: int) -> Modelled:
    code = replace(code, stages=work.stages or code.stages)
    units = work.units or programs
    blocks = blocks_per_multiprocessor(code)
    resident = min(blocks, -(-programs // MULTIPROCESSORS))
    places = MULTIPROCESSORS * resident
    once = code.around if units > programs else code.outside
    if code.hot is not None and code.hot.is_async:  # the first copies stand before the loop, and are among its own
        once = Block(tuple(x for x in once.code if x.name != "LDGSTS"))
    trips = [(once, 1.0), *trips_of(code, work, units)]
    clocks: dict[str, float] = {}
    for block, times in trips:
        for resource, each in clocks_of(block, code.warps).items():
            clocks[resource] = clocks.get(resource, 0.0) + times * each
    wide_bytes = clocks["l2"] * L2_BYTES * units
    pace = max(DEPENDENT, code.warps / ISSUED)
    alone = L2_CLOCKS + MEMORY_CLOCKS + len(once) * pace
    alone += sum(times * iteration_clocks(block, code) for block, times in trips[1:])
    clocks["latency"] = alone / resident
    # The last wave is as long as a full one.
    waves = -(-programs // places) * places / programs if units <= programs else 1.0
    clocks = {resource: each * waves * units / MULTIPROCESSORS for resource, each in clocks.items()}
    clocks["memory"] = work.bytes / COPY_BYTES_PER_S * CLOCK
    limit = max(clocks, key=lambda resource: clocks[resource])
    return Modelled(clocks[limit] / CLOCK * 1e3, limit, blocks, clocks, wide_bytes)
