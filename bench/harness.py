"""How the benches measure: all contenders in turn, checked first, beside a floor measured in the same rounds.

    first call   of each contender: its time (compilation included), its peak memory, and its numbers against the exact
    rounds       each contender and the floor once, every round in another order: a machine that slows down slows all
    row          medians, 20th and 80th percentiles, ratios, what was asked; printed, and kept as JSON with --results

On a CPU times are wall-clock; on a GPU events around the call, after the L2 cache was overwritten.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from r1fast_kernels.products import linear

OURS = "r1fast"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small cases of a GPU's, here on the CPU, to see that they run: rows of the device "fake", which no page shows.
FAKE = os.environ.get("R1FAST_FAKE_GPU") == "1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = {
    "TRL": "trl",
    "Liger": "liger-kernel",
    "CCE": "cut-cross-entropy",
    "transformers": "transformers",
    "vLLM": "vllm",
    "gmm": "grouped-gemm",
    "megablocks": "megablocks",
    "scattermoe": "scattermoe",
}

# Outputs in one order for all contenders of a case; None where a peer does not compute one.
Outputs = Sequence[Tensor | None]
Run = Callable[[], Outputs]
# A peer so slow is timed once, by its first call: the whole bench has to end within ten minutes. Of ours and of what a
# target names, a first call as slow is the first of the rounds.
SLOW_S = 4.0
MIN_ROUNDS, MAX_ROUNDS = 3, 100


@dataclass(frozen=True)
class Floor:
    """The least work that any implementation must do, done by one library call each. Its time counts `scale` times."""

    what: str
    run: Callable[[], object]
    scale: float = 1.0
    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Problem:
    case: Case
    contenders: dict[str, Run]  # ours and the baselines
    floor: Floor
    check: Callable[[str, Outputs], None]  # raises when a contender's first outputs are wrong
    gradient_bytes: int = 0  # of the peak memory, what every implementation returns
    repeated: bool = False  # each timed run follows one of its own, as the steps of a training loop do
    scale: dict[str, float] = field(default_factory=dict)  # of contenders that do a part: their time counts so often
    # What else the row says of ours, from the median milliseconds of each contender.
    numbers: Callable[[dict[str, float]], dict[str, float]] = lambda median_ms: {}


@dataclass
class Timing:
    first_call_s: float
    peak_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    error: str | None = None

    def summary(self, scale: float = 1.0) -> dict[str, Any]:
        if self.error is not None:
            return {"error": self.error}
        samples_ms = [scale * ms for ms in self.samples_ms]
        low, high = spread(samples_ms)
        return {
            "median_ms": statistics.median(samples_ms),
            "spread_ms": [low, high],
            "runs": len(self.samples_ms),
            "first_call_s": self.first_call_s,
            "peak_bytes": self.peak_bytes,
        }


def spread(samples: list[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return cuts[0], cuts[-1]


# ---- inputs, contenders and floors ----


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def in_mode(mode: str, forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], upstream: Outputs) -> Run:
    """`forward` alone without autograd, with its backward pass, or the backward pass of one kept forward pass."""

    def fwd() -> Outputs:
        with torch.no_grad():
            return list(forward())

    def fwd_bwd() -> Outputs:
        outputs = forward()
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    kept = cache(forward)

    def bwd() -> Outputs:
        return torch.autograd.grad(kept(), leaves, upstream, retain_graph=True)

    return {"fwd": fwd, "fwd+bwd": fwd_bwd, "bwd": bwd}[mode]


def agrees_with(exact: Outputs, tolerance: float) -> Callable[[str, Outputs], None]:
    """Relative distance of each output below `tolerance`; peers may be ten times as far, and NaN never passes.

    A loss is the mean of terms around 1 of both signs: below 0.1 its distance counts relative to 0.1.
    """

    def check(name: str, outputs: Outputs) -> None:
        allowed = tolerance if name == OURS else 10 * tolerance
        for index, (got, want) in enumerate(zip(outputs, exact, strict=True)):
            if got is None or want is None:
                continue
            # Summed in fp64, but without an fp64 copy of a gradient that may be gigabytes.
            distance = torch.linalg.vector_norm(got.to(want.dtype) - want, dtype=torch.float64)
            size = torch.linalg.vector_norm(want, dtype=torch.float64)
            error = float(distance / size.clamp(min=1e-30 if want.dim() else 0.1))
            if not error <= allowed:
                raise AssertionError(f"{name}: output {index} is off by {error:.2g}, allowed {allowed:.2g}")

    return check


def products_floor(flops: float, rows: int, dtype: torch.dtype) -> Floor:
    """FLOPs at the rate of products of `rows` rows, 512 channels to 512."""
    x_TD, weight_DD = torch.randn(rows, 512, device=DEVICE).to(dtype), torch.randn(512, 512, device=DEVICE).to(dtype)
    one = 2.0 * rows * 512 * 512
    repeats = max(1, round(1e9 / one))  # the first finds caches and threads as others left them

    def run() -> None:
        for _ in range(repeats):
            linear(x_TD, weight_DD)

    what = f"{flops / 1e9:,.3g} GFLOP, products of {rows} rows"
    return Floor(what, run, flops / (one * repeats), flops=flops)


def stream_floor(what: str, read_bytes: float, write_bytes: float = 0) -> Floor:
    """Bytes at the rate of this machine: on a CPU a copy of what is written and a sum of the rest, on a GPU a copy."""
    total = int(read_bytes + write_bytes)
    copied = total // 2 if DEVICE == "cuda" else int(min(read_bytes, write_bytes))
    source, target = torch.ones(2, max(1, copied // 4), device=DEVICE)
    rest = torch.ones(max(0, total - 2 * copied) // 4, device=DEVICE)

    def run() -> None:
        if copied:
            target.copy_(source)
        if rest.numel():
            rest.sum()

    rate = "copy bandwidth" if DEVICE == "cuda" else "copy and sum" if copied else "sum"
    return Floor(f"{what} ({rate})", run, bytes=total)


# ---- time and memory ----


@cache
def _l2_flush() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def time_ms(run: Callable[[], object], *, repeated: bool = False) -> float:
    if repeated:
        run()
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # It also keeps the GPU busy while the host launches, as a training step does.
        _l2_flush().zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    if not repeated:
        # Else a large tensor costs its page faults or not, as the contender before it happens to have left the heap.
        ctypes.CDLL(None).malloc_trim(0)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def kernels_of(run: Callable[[], object]) -> int:
    """How many a GPU runs, those of CUDA graphs included, copies not; elsewhere 0."""
    if DEVICE == "cpu":
        run()
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    on_device = (event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, key
    return int(found[1]) * 1024


def peak_bytes(run: Run) -> tuple[Outputs, int]:
    """What `run` returns, and the most memory that was in use beyond what was before it."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        return outputs, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else freed pages that are still mapped would be taken again for free
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present VmRSS
    before = _status_bytes("VmRSS")
    outputs = run()
    return outputs, max(0, _status_bytes("VmHWM") - before)


def _first_call(name: str, problem: Problem) -> Timing:
    begin, run = time.perf_counter(), problem.contenders[name]
    outputs, peak = peak_bytes(run)
    timing = Timing(time.perf_counter() - begin, peak)
    problem.check(name, outputs)
    del outputs
    if name == "compile":
        timing.peak_bytes = peak_bytes(run)[1]  # the first call was the compiler's
    elif timing.first_call_s > SLOW_S:
        timing.samples_ms.append(timing.first_call_s * 1e3)
    return timing


def measure(problem: Problem, benchmark: Any, seconds: float) -> dict[str, Any]:
    """The row of a case. pytest-benchmark drives the rounds with ours; its setup hook times the others in between."""
    assert OURS in problem.contenders, list(problem.contenders)
    timings: dict[str, Timing] = {}
    for name in problem.contenders:
        try:
            timings[name] = _first_call(name, problem)
        except Exception as error:
            if name == OURS:
                raise
            # A baseline that cannot run here is said so in its row, and is not the end of ours.
            message = " ".join(str(error).split()).replace("|", "/")[:200]
            timings[name] = Timing(0, error=f"{type(error).__name__}: {message}")
            gc.collect()
    floor = Timing(0)
    problem.floor.run()
    runs: dict[str, Callable[[], object]] = {"floor": problem.floor.run, **problem.contenders}
    samples = {"floor": floor.samples_ms, **{name: timing.samples_ms for name, timing in timings.items()}}
    again = {"floor", OURS, "eager", *(target.than for target in problem.case.targets)}
    able = [name for name in runs if name == "floor" or timings[name].error is None]

    def time_of(name: str) -> float:
        return time_ms(runs[name], repeated=problem.repeated and name != "floor")

    live = [name for name in able if name in again or not samples[name]]
    for name in live:
        if not samples[name]:
            samples[name].append(time_of(name))
    round_ms = sum(samples[name][0] for name in live)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds * 1e3 / round_ms))) - 1
    others = [name for name in live if name != OURS]

    def time_others() -> None:
        others.append(others.pop(0))
        for name in others:
            samples[name].append(time_of(name))

    benchmark.group = problem.case.op
    benchmark.pedantic(lambda: samples[OURS].append(time_of(OURS)), setup=time_others, rounds=rounds)
    return _row(problem, floor, timings)


def _row(problem: Problem, floor: Timing, timings: dict[str, Timing]) -> dict[str, Any]:
    case = problem.case
    floor_ms = statistics.median(floor.samples_ms) * problem.floor.scale
    contenders = {name: timing.summary(problem.scale.get(name, 1.0)) for name, timing in timings.items()}
    ours = contenders.pop(OURS)
    ratios = {name: x["median_ms"] / ours["median_ms"] for name, x in contenders.items() if "error" not in x}
    median_ms = {name: x["median_ms"] for name, x in (contenders | {OURS: ours}).items() if "error" not in x}
    targets = []
    for target in case.targets:
        if target.measure == "fraction":
            value = floor_ms / ours["median_ms"]
        elif target.measure == "ms":
            value = ours["median_ms"]
        elif target.measure == "extra GB":
            value = (ours["peak_bytes"] - problem.gradient_bytes) / 1e9
        elif target.than not in ratios:
            continue
        elif target.measure == "speedup":
            value = ratios[target.than]
        else:
            value = ours["peak_bytes"] / contenders[target.than]["peak_bytes"]
        targets.append({"target": str(target), "measured": value, "met": target.met(value)})
    return {
        "op": case.op,
        "case": case.name,
        "device": case.device,
        "dtype": case.dtype,
        **ours,
        "floor_ms": floor_ms,
        "floor": problem.floor.what,
        "fraction": floor_ms / ours["median_ms"],
        "gb_per_s": problem.floor.bytes / ours["median_ms"] / 1e6 or None,
        "tflop_per_s": problem.floor.flops / ours["median_ms"] / 1e9 or None,
        "gradient_bytes": problem.gradient_bytes,
        "numbers": problem.numbers(median_ms),
        "ratios": ratios,
        "baselines": contenders,
        "targets": targets,
    }


# ---- what it was measured on ----


def _version(package: str) -> str | None:
    """By the module: grouped_gemm also comes from nv-grouped-gemm, and scattermoe as a folder of sources."""
    module = package.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


@cache
def device_name() -> str:
    """cpu, h100, h200, ...: the first part of a results file's name; or fake."""
    if FAKE:
        return "fake"
    if DEVICE == "cpu":
        return "cpu"
    words = re.findall(r"[A-Za-z]+\d+\w*", torch.cuda.get_device_name())
    return words[0].lower() if words else "cuda"


@cache
def environment() -> dict[str, Any]:
    commit = os.environ.get("R1FAST_COMMIT") or (
        subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True,
            text=True,
        ).stdout.strip()
    )  # fmt: skip
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "device": device_name(),
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "cpu": f"{model[1] if model else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version for name in ("triton", *PEERS.values()) if (version := _version(name))},
        },
    }


def show(row: dict[str, Any]) -> str:
    """The row for a terminal."""

    def memory(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e6:,.0f} MB"

    low, high = row["spread_ms"]
    rates = [f"{row[key]:.3g} {unit}" for key, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")) if row[key]]
    lines = [
        f"\n{row['op']}  {row['case']}",
        f"  {OURS:12s} {row['median_ms']:10.3f} ms  ({low:.3f} to {high:.3f}, {row['runs']} runs)  "
        f"{memory(row['peak_bytes'])}, of it {memory(row['gradient_bytes'])} gradients  {'  '.join(rates)}",
        f"  {'floor':12s} {row['floor_ms']:10.3f} ms  = {row['fraction']:.0%} of ours: {row['floor']}",
    ]
    lines += [f"  {name:12s} {value:10,.1f}" for name, value in row["numbers"].items()]
    for name, x in row["baselines"].items():
        if "error" in x:
            lines.append(f"  {name:12s} {x['error']}")
            continue
        low, high = x["spread_ms"]
        lines.append(
            f"  {name:12s} {x['median_ms']:10.3f} ms  = {row['ratios'][name]:.2f}x ours  ({low:.3f} to {high:.3f}, "
            f"{x['runs']} runs, first call {x['first_call_s']:.1f} s)  {memory(x['peak_bytes'])}"
        )
    for target in row["targets"]:
        lines.append(f"  asked {target['target']}: {target['measured']:.2f}, {'met' if target['met'] else 'MISSED'}")
    return "\n".join(lines)
