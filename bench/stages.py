"""Fifteen minutes of one GPU, in stages: what tells most comes first, and what a stage has found stays.

    machine  40 s   what is here: doctor, versions, clocks                                 summary.json
    smoke   120 s   tests marked gpu: the ops, flash attention, graphs of a decode step    summary.json
    ops     240 s   the ops beside Liger, CCE, TRL, torch.compile and grouped_mm           ops.json
    models  240 s   1.5B: decode, training step, GRPO step; decode of a 16B mixture        models.json
    rest    240 s   the other cases; then the other tests, while there is time             rest.json, summary.json

    python bench/stages.py [--out DIR] [--fake] [STAGE ..]      the stages of that name; all where none is named

Rows are written as they are measured; summary.json after each stage, with its exit status, seconds, and the tests that
failed. A stage at its limit is interrupted as by Ctrl-C, and the next one begins. The last line is the summary in one.
--fake: where there is no GPU, small cases on the CPU, and kernels that are started and compute nothing.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cases import CASES, Case  # noqa: E402

SMOKE = tuple(
    f"tests/{path}"
    for path in (
        "kernels/test_selective_logprobs.py", "kernels/test_grouped_gemm.py", "kernels/test_moe_experts.py",
        "kernels/test_decode_attention.py", "models/test_flash.py", "kernels/test_sample_tokens.py", "rollout",
        "kernels/test_host_sync.py", "kernels/test_grpo_loss.py",
    )
)  # fmt: skip
OPS = (
    "selective_logprobs", "grouped_gemm", "moe_experts", "decode_attention", "sample_tokens", "packed_attention",
    "linear_logprobs", "linear_grpo_loss", "linear_cross_entropy", "grpo_loss",
)  # fmt: skip
DENSE, MIXTURE = "qwen2.5-1.5b", "v3-16b-a3b"
MODELS = (("decode_layers", DENSE), ("generate", DENSE), ("train_step", DENSE), ("grpo_step", DENSE),
          ("generate", MIXTURE))  # fmt: skip
LARGEST = "T32768"  # of the grouped products the size that was asked about; smaller ones are for the rest
PYTEST = ("-p", "no:cacheprovider", "-q")
GRACE_S = 15  # between an interrupt and the end of a stage


@dataclass(frozen=True)
class Part:
    """A process of a stage."""

    command: Sequence[str]
    junit: Path | None = None  # where pytest counts its tests


def cases_of(stage: str) -> list[Case]:
    """Of a GPU, each in one stage."""
    cases = [case for case in CASES if case.device == "cuda"]
    models = [case for op, mode in MODELS for case in cases if (case.op, case.mode) == (op, mode)]
    ops = [case for op in OPS for case in cases if case.op == op and ("E" not in case.sizes or LARGEST in case.name)]
    rest = [case for case in cases if case not in models and case not in ops]
    return {"ops": ops, "models": models, "rest": rest}[stage]


def measure(cases: Sequence[Case], rows: Path, fake: bool) -> Part:
    nodes = [f"bench/bench_{case.op}.py::test_{case.op}[{case.name}]" for case in cases]
    options = ["--benchmark-only", "--benchmark-columns=median,rounds", "--seconds", "0.05" if fake else "1.5"]
    return Part([sys.executable, "-m", "pytest", *nodes, *options, "--results", str(rows), *PYTEST])


def test(paths: Sequence[str], junit: Path, fake: bool) -> Part:
    side_by_side = [] if fake or importlib.util.find_spec("xdist") is None else ["-n", "8"]
    options = ["-m", "gpu", "-p", "no:benchmark", "--durations=10", f"--junitxml={junit}"]
    return Part([sys.executable, "-m", "pytest", *paths, *side_by_side, *options, *PYTEST], junit)


def parts_of(stage: str, out: Path, fake: bool) -> list[Part]:
    if stage == "machine":
        clocks = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
        return [*([] if fake else [Part(clocks)]), Part([sys.executable, "-m", "r1fast.doctor"])]
    if stage == "smoke":
        return [test(SMOKE, out / "smoke.xml", fake)]
    measured = measure(cases_of(stage), out / f"{stage}.json", fake)
    others = ["tests", *(f"--ignore={path}" for path in SMOKE)]
    return [measured, test(others, out / "tests.xml", fake)] if stage == "rest" else [measured]


STAGES = {"machine": 40, "smoke": 120, "ops": 240, "models": 240, "rest": 240}  # seconds at most


def run(part: Part, seconds: float, log: Path) -> tuple[int | None, str]:
    """(exit status, or None at the limit; the end of what it said), which also goes to the log and the terminal."""
    with log.open("ab") as file:
        begin = file.tell()
        try:
            process = subprocess.Popen(part.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        except OSError as error:  # there is no such command
            return 127, f"{error}\n"
        status: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:  # at the limit, or where this script is ended
            end(process)
    said = log.read_bytes()[begin:].decode(errors="replace")
    print(said, end="", flush=True)
    return status, said


def end(process: "subprocess.Popen[bytes]") -> None:
    """With all that it has started; pytest then writes what it has."""
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def counted(junit: Path) -> dict[str, Any]:
    """Of pytest's report: how many tests there were, and which of them failed."""
    if not junit.exists():
        return {"tests": 0}
    try:
        cases = ElementTree.parse(junit).getroot().findall(".//testcase")
    except ElementTree.ParseError:  # killed while it was written
        return {"tests": 0}
    finally:
        junit.unlink()

    def ended(how: str) -> list[str]:
        return [f"{x.get('classname')}::{x.get('name')}" for x in cases if x.find(how) is not None]

    return {"tests": len(cases), "skipped": len(ended("skipped")), "failed": ended("failure") + ended("error")}


def run_stage(stage: str, out: Path, fake: bool, seconds: float) -> dict[str, Any]:
    begin, found = time.monotonic(), dict[str, Any]()
    statuses: list[int | None] = []
    rows = out / f"{stage}.json"
    rows.unlink(missing_ok=True)  # of an earlier run
    for part in parts_of(stage, out, fake):
        left = seconds - (time.monotonic() - begin)
        if left < 1:
            statuses.append(None)
            break
        status, said = run(part, left, out / "log.txt")
        statuses.append(status)
        if part.junit is not None:
            found |= counted(part.junit)
        if stage == "machine":
            found.setdefault("said", []).extend(said.splitlines())
    if rows.exists():
        found["rows"] = len(json.loads(rows.read_text())["rows"])
    took = round(time.monotonic() - begin, 1)
    return {"stage": stage, "statuses": statuses, "seconds": took, "limit_s": seconds, **found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh")
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--fake", action="store_true", help="without a GPU, on small cases")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    # A shell starts what runs behind it (&) with SIGINT ignored, which stages would inherit.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler)
    if args.fake:
        os.environ["R1FAST_FAKE_GPU"] = "1"
    summary: dict[str, Any] = {"device": "fake" if args.fake else "gpu", "stages": []}
    file, names = args.out / "summary.json", args.stages or list(STAGES)
    before = json.loads(file.read_text()) if file.exists() else summary
    if before["device"] == summary["device"]:
        summary["stages"] = [found for found in before["stages"] if found["stage"] not in names]
    for stage in names:
        summary["stages"].append(run_stage(stage, args.out, args.fake, STAGES[stage]))
        file.write_text(json.dumps(summary, indent=1) + "\n")
    stages = [{key: value for key, value in found.items() if key != "said"} for found in summary["stages"]]
    print(json.dumps(summary | {"stages": stages}))
    return int(any(status != 0 for found in stages for status in found["statuses"]))


if __name__ == "__main__":
    sys.exit(main())
