"""What a run directory holds, read with patience: a run may have stopped anywhere, and any file may be missing."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1fast.observe.formats import is_number
from r1fast.recipe_yaml import load_yaml

# Pages stay light: this many rows per sample file are shown at most.
_SAMPLES_PER_FILE = 4
_LARGEST = 1e300  # of a curve: the distance of two points must be a number


@dataclass
class StageData:
    """One stage: its entry in summary.json, its settings, its curves, its samples."""

    name: str
    kind: str = ""
    status: str = "done"
    seconds: float | None = None
    inputs: list[str] = field(default_factory=list)
    model: str | None = None
    eval_before: dict[str, Any] = field(default_factory=dict)
    eval_after: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    expert_load: list[tuple[int, list[list[float]]]] = field(default_factory=list)  # (step, [L][E]), 1 = even
    samples: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        return self.status != "pending" or bool(self.curves)

    @property
    def last_step(self) -> int:
        return max((points[-1][0] for points in self.curves.values() if points), default=0)


@dataclass
class RunData:
    directory: Path
    recipe: str
    config_text: str
    summary: dict[str, Any]
    stages: list[StageData]


def load_run(run_dir: Path) -> RunData:
    """Read config.yaml, summary.json, */metrics.jsonl and */samples/*.parquet of a run directory."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run directory: got {str(run_dir)!r}, which is no directory; give the --output-dir of a run")
    summary = _read_summary(run_dir / "summary.json")
    config_text, config = _read_config(run_dir / "config.yaml")
    stages = _stages(run_dir, summary, config)
    if not stages:
        raise ValueError(
            f"run directory {str(run_dir)!r}: no summary.json and no <stage>/metrics.jsonl in it; "
            "give the --output-dir of a run that has started"
        )
    for stage in stages:
        rows = _read_metrics(run_dir / stage.name / "metrics.jsonl")
        stage.curves = _curves(rows)
        stage.expert_load = [(step, row["moe/load"]) for step, row in rows.items() if _is_table(row.get("moe/load"))]
        stage.samples = _read_samples(run_dir / stage.name / "samples")
    recipe = summary.get("recipe") or config.get("name") or run_dir.resolve().name
    return RunData(run_dir, str(recipe), config_text, summary, stages)


def _read_summary(path: Path) -> dict[str, Any]:
    """summary.json; one that a full disk or a kill cut short counts as missing, the metrics still tell."""
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    content = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_yaml(content)
    except ValueError:
        config = None
    return content, config if isinstance(config, dict) else {}


def _stages(run_dir: Path, summary: dict[str, Any], config: dict[str, Any]) -> list[StageData]:
    """The stages in order: as summary.json has them, else as the recipe does, else by their folders."""
    listed = [entry for entry in _list(config.get("stages")) if isinstance(entry, dict) and "name" in entry]
    settings = {str(entry["name"]): entry for entry in listed}
    entries = [entry for entry in _list(summary.get("stages")) if isinstance(entry, dict) and "name" in entry]
    if not entries:
        folders = sorted(run_dir.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
        present = [path.parent.name for path in folders]
        names = [*settings, *(name for name in present if name not in settings)] if present else []
        entries = [{"name": name, "status": "stopped" if name in present else "pending"} for name in names]
    return [_stage(entry, settings.get(str(entry["name"]), {})) for entry in entries]


def _stage(entry: dict[str, Any], settings: dict[str, Any]) -> StageData:
    phases = _mapping(entry.get("phases"))
    return StageData(
        name=str(entry["name"]),
        kind=str(entry.get("kind") or settings.get("kind") or ""),
        status=str(entry.get("status") or "done"),
        seconds=float(entry["seconds"]) if is_number(entry.get("seconds")) else None,
        inputs=[str(name) for name in _list(entry.get("inputs"))],
        model=str(entry["model"]) if entry.get("model") else None,
        eval_before=_mapping(entry.get("eval_before")),
        eval_after=_mapping(entry.get("eval_after")),
        numbers=_mapping(entry.get("numbers")),
        phases={str(name): float(value) for name, value in phases.items() if is_number(value) and value > 0},
        settings={str(name): value for name, value in settings.items() if name != "name"},
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line, in order; of a step written twice (a resume) the last line counts."""
    if not path.is_file():
        return {}
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the half line of a killed writer, or damage
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows[int(row["step"])] = row
    return dict(sorted(rows.items()))


def _is_table(value: Any) -> bool:
    return bool(_list(value)) and all(_list(line) and all(map(is_number, line)) for line in value)


def _curves(rows: dict[int, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) pairs."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in rows.items():
        for name, value in row.items():
            if name not in ("step", "time") and is_number(value) and abs(value) < _LARGEST:
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def _read_samples(directory: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """The first, a middle and the last file of samples, a few rows of each, best and worst rewards among them."""
    paths = sorted(directory.glob("*.parquet"))
    if not paths:
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = sorted({0, (len(paths) - 1) // 2, len(paths) - 1})
    samples = []
    for path in (paths[i] for i in chosen):
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError):  # cut short by a kill: the other files still tell
            continue
        if rows:
            digits = "".join(letter for letter in path.stem if letter.isdigit())
            step = rows[0].get("step")
            samples.append((int(step) if is_number(step) else int(digits or 0), _spread(rows)))
    return samples


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows from the best reward to the worst, evenly; the first ones when there is no reward."""
    if len(rows) <= _SAMPLES_PER_FILE:
        return rows
    if not any(is_number(row.get("reward")) for row in rows):
        return rows[:_SAMPLES_PER_FILE]
    ranked = sorted(rows, key=lambda row: -row["reward"] if is_number(row.get("reward")) else float("inf"))
    return [ranked[i * (len(ranked) - 1) // (_SAMPLES_PER_FILE - 1)] for i in range(_SAMPLES_PER_FILE)]
