"""docs/benchmarks.md is written from bench/results, and every case has a bench."""

import subprocess
import sys
from pathlib import Path

from bench.cases import CASES, OPS
from r1fast_kernels.dispatch import IMPLEMENTATIONS

ROOT = Path(__file__).parents[1]


def test_page_is_what_the_results_say() -> None:
    result = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_case_per_op_and_device_and_a_bench_per_op() -> None:
    assert len({(case.op, case.name, case.device) for case in CASES}) == len(CASES)
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")} == set(OPS)
    assert set(IMPLEMENTATIONS) - set(OPS) == {"moe_dispatch"}  # a fraction of moe_experts, timed inside it
    for op in OPS:
        devices = {case.device for case in CASES if case.op == op}
        alone = {"rms_norm": {"cpu"}, "decode_parts": {"cuda"}}  # on a GPU torch's; a CPU has steps of one call
        assert devices == alone.get(op, {"cpu", "cuda"})
