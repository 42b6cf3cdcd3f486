"""Writes docs/benchmarks.md from bench/results/*.json, and what is modelled from bench/modelled.json.

python bench/report.py            rewrites the page
python bench/report.py --check    fails when the page is not what the results say
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cases import CASES, Case  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
MODELLED = ROOT / "bench" / "modelled.json"  # by bench/modelled.py
LEAST_PART = 0.05  # of the modelled time of a case, for a kernel to be shown
NOT_YET = "not yet measured"
Rows = dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]  # (op, case) -> (row, environment)
RATES = (("tflop_per_s", "TFLOP/s"), ("gb_per_s", "GB/s"))

HEAD = """\
# Benchmarks

<!-- Written by bench/report.py from bench/results/*.json. Do not edit: run `python bench/report.py`. -->

`make bench` measures everything that this machine can; `make bench ARGS="--results bench/results"` also keeps the rows,
from which `python bench/report.py` makes this page. On a GPU, without installing anything, in fifteen minutes:
`bench/gpu.sh`.

- **A row exists only after the op agreed with its reference, in fp64 or fp32, in the same process.** So must every
  baseline, which may be ten times as far off.
- **Time** is the median, with the 20th and 80th percentile. All contenders of a row were timed in turn, round after
  round. A peer that takes more than four seconds was timed once, by its first call.
- **Floor**: the least work that any implementation must do, timed on this machine in the same rounds. **Of floor** is
  its share of our time.
- **Ratio**: the baseline's time over ours; above 1 we are faster. `eager` is what a trainer writes by hand in plain
  torch, in the dtype of the inputs; peers run with their defaults.
- **Memory**: the most in use during the call beyond what was there before it, gradients included.
- ***Modelled*** is not measured: what the machine code of the kernels allows on an H200 at best (`bench/limits.py`;
  [LOG.md](LOG.md) has how far that was from rows measured earlier), of the code as it is now, while a measured row is
  of the commit above its table. The floor's share of it, and what limits the kernel that takes most of the time; then
  of each kernel with 5% of the time registers of a thread x blocks that a multiprocessor takes, and instructions an
  element. *own*: with grouped products of our own where torch's are taken.
"""


def load() -> dict[str, Rows]:
    """The rows of each device. Of two files with the same row the one measured later counts."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    devices: dict[str, Rows] = {}
    for found in sorted(files, key=lambda found: found["environment"]["date"]):
        environment = found["environment"]
        if environment["device"] == "fake":  # of gpu.sh --fake: nothing is measured there
            raise SystemExit("bench/results holds rows of the device fake: remove them")
        for row in found["rows"]:
            devices.setdefault(environment["device"], {})[row["op"], row["case"]] = row, environment
    return devices


def time_text(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms" if ms >= 0.1 else f"{ms * 1000:.0f} us"


def memory_text(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def cells(row: dict[str, Any]) -> list[str]:
    low, high = (time_text(ms) for ms in row["spread_ms"])
    rate = next((f", {row[key]:.0f} {unit}" for key, unit in RATES if row[key]), "") if row["device"] == "cuda" else ""
    baselines = row["baselines"].items()
    ratios = [
        f"{name} **{row['ratios'][name]:.2f}x**" if name in row["ratios"] else f"{name}: {x['error']}"
        for name, x in baselines
    ]
    numbers = "".join(f"<br>{value:,.0f} {name}" for name, value in row.get("numbers", {}).items())
    memory = [f"{name} {memory_text(x['peak_bytes'])}" for name, x in baselines if "error" not in x]
    return [
        f"{time_text(row['median_ms'])} ({low} to {high}){rate}{numbers}",
        f"{time_text(row['floor_ms'])}: {row['floor']}",
        f"{row['fraction']:.0%}",
        "<br>".join(ratios),
        "<br>".join([f"**{memory_text(row['peak_bytes'])}**", *memory]),
    ]


def targets(case: Case, row: dict[str, Any] | None) -> str:
    """What was asked of a case, with what was measured."""
    measured = {} if row is None else {x["target"]: x["measured"] for x in row["targets"]}
    if row is not None:  # also of what was asked later than the row was measured
        ratios = row["ratios"]
        measured |= {str(x): ratios[x.than] for x in case.targets if x.measure == "speedup" and x.than in ratios}
    texts = []
    for target in case.targets:
        value = measured.get(str(target))
        if value is None:
            texts.append(str(target) if row is None else f"{target}: not measured")
            continue
        shown = f"{value:.0%}" if target.measure == "fraction" else f"{value:.2f}"
        texts.append(f"{target}: {shown}, {'met' if target.met(value) else '**missed**'}")
    return "<br>".join(texts)


def environments(rows: Rows) -> list[str]:
    """One line per distinct machine, commit and set of versions; the rows of one table may come from several runs."""
    lines: dict[str, set[str]] = {}
    for (op, _), (_, x) in rows.items():
        versions = ", ".join(f"{name} {version}" for name, version in x["versions"].items())
        processor = x["gpu"] or f"{x['cpu']}, {x['threads']} threads"
        lines.setdefault(f"{processor}; commit {x['commit']}, {x['date']}; {versions}", set()).add(op)
    if len(lines) == 1:
        return [next(iter(lines)) + "."]
    return [f"- {', '.join(sorted(ops))}: {line}." for line, ops in lines.items()]


def modelled() -> dict[str, dict[str, Any]]:
    """The rows of modelled.json, by op and case."""
    return {row["row"]: row for row in json.loads(MODELLED.read_text())["rows"]}


def modelled_cells(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Share and limit, kernels; of a case, and of its products of our own."""
    shares, kernels = [], []
    for label, row in rows:
        shares.append(f"{label}{row['share']:.0%}: {row['limit']}")
        for x in row["kernels"]:
            if x["times"] * x["us"] >= LEAST_PART * 1e3 * row["ms"]:
                name = x["name"].strip("_").removesuffix("_kernel")
                each = "" if x["per_element"] == "-" else f", {x['per_element']} an element"
                kernels.append(f"{label}{name} {x['registers']} x {x['blocks']}{each}")
    return ["<br>".join(shares), "<br>".join(dict.fromkeys(kernels))]


def table(device: str, rows: Rows) -> list[str]:
    on_gpu = device == "cuda"
    titles = ["op", "case", "time", "floor", "of floor", "ratio", "memory", "asked"]
    titles += ["*modelled* of floor: limit", "*registers x blocks*"] if on_gpu else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    of_code = modelled() if on_gpu else {}
    for case in CASES:
        if case.device == device:
            row = rows.get((case.op, case.name), (None,))[0]
            shown = [NOT_YET, "", "", "", ""] if row is None else cells(row)
            shown = [case.op, case.name, *shown, targets(case, row)]
            if on_gpu:
                names = {"": f"{case.op} {case.name}", "*own* ": f"{case.op} {case.name} own"}
                shown += modelled_cells([(label, of_code[name]) for label, name in names.items() if name in of_code])
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def page() -> str:
    devices = load()
    gpus = sorted(name for name in devices if name != "cpu")
    parts = [HEAD]
    for name in ["cpu", *(gpus or ["cuda"])]:
        rows = devices.get(name, {})
        title = {"cpu": "CPU", "cuda": "GPU"}.get(name, name.upper())
        parts.append("\n".join([f"## {title}", "", *environments(rows), *([""] if rows else []),
                                *table("cpu" if name == "cpu" else "cuda", rows)]) + "\n")  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what bench/results say: run python bench/report.py")


if __name__ == "__main__":
    main()
