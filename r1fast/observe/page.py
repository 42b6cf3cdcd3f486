"""report.html: one self-contained page from a run directory, of a run that ended or stopped anywhere.

Here a run's files are read, with patience: any may be missing or damaged. page.html.jinja holds the layout, the style,
and the script that draws the charts from the JSON that `chart_data` puts into the page.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel

from r1fast.run_folder import replace_file

from r1fast.observe.formats import (  # isort: skip
    format_number, format_percent, format_seconds, interval, is_number, losses, score, shares,
)  # fmt: skip

# The colour of each phase of a step, in the order of a step; other names get what is left.
PHASES = {"generate": "c1", "reward": "c2", "logprobs": "c3", "update": "c4", "evaluate": "c5", "save": "c6"}
PHASES["other"] = "c0"
COUNTS = ("length", "failures", "unscorable")  # of an evaluation, below what it measures as shares of one
# Curves a person looks at first, in this order; the rest is one click away.
FIRST_CURVES = (
    "reward", "eval/pass@1", "rewards/*/mean", "loss", "accuracy", "kl", "completions/mean_length", "entropy",
    "learning_rate", "grad_norm",
)  # fmt: skip
MAX_POINTS = 160  # of a curve; each is the mean of its share
SAMPLES_PER_FILE = 4
_TAGS = re.compile(r"(</?think>|</?answer>|\|special_token\||<｜[^｜<>]{1,40}｜>)")


class StageData(BaseModel):
    """One stage: its entry in summary.json, and what its folder holds."""

    name: str
    kind: str = ""
    status: str = "done"
    seconds: float | None = None
    inputs: list[str] = []
    model: str | None = None
    eval_before: dict[str, Any] = {}
    eval_after: dict[str, Any] = {}
    validations: list[dict[str, Any]] = []  # under way, each with its step
    numbers: dict[str, Any] = {}
    phases: dict[str, float] = {}
    settings: dict[str, Any] = {}
    last_step: int = 0
    curves: dict[str, list[tuple[int, float]]] = {}
    expert_load: dict[int, list[list[float]]] = {}  # step -> [L][E], 1 = even: of the first and the last that has it
    samples: list[tuple[int, list[dict[str, Any]]]] = []

    def read(self, folder: Path) -> None:
        """What the stage's folder says, and its phases in the order of a step, what none accounts for as "other"."""
        rows = _read_metrics(folder / "metrics.jsonl")
        self.last_step = max(rows, default=0)
        for step, row in rows.items():
            for name, value in row.items():
                if name not in ("step", "time") and is_number(value):
                    self.curves.setdefault(name, []).append((step, value))
        for result in self.validations:
            for name in shares([result]):
                if (value := score(result, name)) is not None and is_number(at := result.get("step")):
                    self.curves.setdefault(f"eval/{name}", []).append((int(at), value))
        tables = [(step, row["moe/load"]) for step, row in rows.items() if _is_table(row.get("moe/load"))]
        self.expert_load = dict([*tables[:1], *tables[-1:]])
        self.samples = _read_samples(folder / "samples")
        given = {name: time for name, time in self.phases.items() if is_number(time) and time > 0}
        self.phases = {name: given[name] for name in (*PHASES, *given) if name in given}
        seconds = self.seconds if is_number(self.seconds) else 0.0
        if seconds - self.total > 0.001 * seconds:
            self.phases["other"] = seconds - self.total

    @property
    def total(self) -> float:
        """Seconds that the phases add up to."""
        return sum(self.phases.values())

    @property
    def begun(self) -> bool:
        return self.status != "pending" or self.last_step > 0

    @property
    def sources(self) -> list[str]:
        """What the stage takes: stages, or a model from outside."""
        return list(dict.fromkeys(name for name in (self.model, *self.inputs) if name and name != self.name))

    @property
    def curve_groups(self) -> tuple[list[str], list[str]]:
        """The names of the curves to see first, and the others."""
        first = [name for pattern in FIRST_CURVES for name in self.curves if fnmatch(name, pattern)]
        rest = sorted(self.curves.keys() - first)
        return (first, rest) if first else (rest, [])

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        both = {"before": self.eval_before, "after": self.eval_after}
        return {name: evaluation for name, evaluation in both.items() if evaluation}

    @property
    def score_rows(self) -> list[tuple[str, list[str], str]]:
        """(score, what is written of it per evaluation, the change)."""
        rows, evaluations = [], list(self.evaluations.values())
        for key in (*shares(evaluations), *COUNTS):
            values = [score(evaluation, key) for evaluation in evaluations]
            if any(values) or (key not in COUNTS and any(value is not None for value in values)):
                texts = [_written(key, evaluation) for evaluation in evaluations]
                rows.append((key, texts, _change(key, *values) if len(values) == 2 else ""))
        return rows

    @property
    def free_numbers(self) -> dict[str, Any]:
        """The stage's numbers, without those that `counts` has."""
        return {key: self.numbers[key] for key in self.numbers if not (self.counts and key in ("kept", "dropped"))}

    @property
    def counts(self) -> list[tuple[str, int, str]]:
        """What a selecting stage kept, and what it dropped for which reason, with the colour of each."""
        numbers, dropped = self.numbers, self.numbers.get("dropped")
        if not isinstance(dropped, dict):
            return []
        kept = [("kept", int(numbers["kept"]), "c3")] if is_number(numbers.get("kept")) else []
        reasons = [(name.replace("_", " "), int(count), "c2") for name, count in dropped.items() if is_number(count)]
        return kept + sorted(reasons, key=lambda reason: -reason[1])


class RunData(BaseModel):
    """summary.json, and the text of config.yaml."""

    recipe: str = ""
    started: str = ""
    machine: dict[str, Any] = {}
    seed: int | None = None
    seconds: float | None = None
    stages: list[StageData] = []
    config_text: str = ""

    @property
    def evaluated(self) -> dict[str, dict[str, Any]]:
        """In the chain's order; a model from outside enters with the first evaluation before a use of it."""
        found: dict[str, dict[str, Any]] = {}
        for stage in self.stages:
            for name, evaluation in ((stage.model, stage.eval_before), (stage.name, stage.eval_after)):
                if name and score(evaluation, "pass@1") is not None:
                    found.setdefault(name, evaluation)
        return found

    @property
    def last_trained(self) -> str:
        """The evaluated model that the chain is about: students come after it, models from outside before."""
        trained = {stage.name for stage in self.stages if stage.kind != "distill"}
        names = [name for name in self.evaluated if name in trained] or list(self.evaluated)
        return "r1" if "r1" in names else names[-1]


def build_report(run_dir: Path) -> Path:
    """Write RUN/report.html, whole, and return its path; ValueError as of load_run, OSError where it cannot be."""
    path = Path(run_dir) / "report.html"
    replace_file(path, render(load_run(Path(run_dir))).encode(errors="replace"))
    return path


def render(run: RunData) -> str:
    """The page as text. Jinja escapes whatever the run says, in the JSON too."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "percent": format_percent, "seconds": format_seconds}
    environment.filters |= {"short": short_name, "losses": losses, "flat": flat, "pieces": pieces, "chips": chips}
    names = {name for stage in run.stages for name in stage.phases}
    colours = {name: colour for name, colour in PHASES.items() if name in names}
    colours |= {name: f"c{7 + i % 3}" for i, name in enumerate(sorted(names - PHASES.keys()))}
    return environment.get_template("page.html.jinja").render(run=run, colours=colours, data=chart_data(run))


def chart_data(run: RunData) -> dict[str, Any]:
    """What the page's script draws."""
    stages = [
        {
            "name": stage.name, "kind": stage.kind, "status": stage.status, "begun": stage.begun,
            "sources": stage.sources, "scores": _scores(stage.eval_after),
            "rows": [stage.numbers[key] for key in ("kept", "rows") if is_number(stage.numbers.get(key))],
            "curves": {name: _thin(points) for name, points in stage.curves.items()},
            "load": list(stage.expert_load.values()),
        }
        for stage in run.stages
    ]  # fmt: skip
    return {"stages": stages, "scores": [(name, _scores(evaluation)) for name, evaluation in run.evaluated.items()]}


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    drawn = {key: score(evaluation, key) for key in ("pass@1", "language")}
    return {key: share for key, share in drawn.items() if share is not None} | {"interval": interval(evaluation)}


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    shares = np.array_split(np.array(points, dtype=float), min(MAX_POINTS, len(points)))
    ends = [points[0][0], *(share[-1, 0] for share in shares[1:])]
    return [(end, float(f"{share[:, 1].mean():.6g}")) for end, share in zip(ends, shares)]


def short_name(name: str) -> str:
    """The last part of a Hub id or a path: charts have little room."""
    return name.rstrip("/").rpartition("/")[2] or name


def _written(key: str, evaluation: Mapping[str, Any]) -> str:
    if key in COUNTS:
        return format_number(evaluation.get(key)) + " tokens" * (key == "length" and key in evaluation)
    bounds = interval(evaluation) if key == "pass@1" else None
    return format_percent(evaluation.get(key)) + (f" ± {format_percent((bounds[1] - bounds[0]) / 2)}" if bounds else "")


def _change(key: str, old: float | None, new: float | None) -> str:
    if old is None or new is None or key in ("failures", "unscorable"):
        return ""
    return f"{(new - old) * (1 if key in COUNTS else 100):+.1f}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings or numbers as lines: (dotted name, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif is_number(value) or isinstance(value, str):
            yield f"{prefix}{key}", format_number(value)
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def pieces(text: str, longest: int = 3500) -> Iterator[tuple[str, str]]:
    """(style, text) of a completion: its tags marked, its answer strong, a long part without its middle."""
    style, separators = "", 0
    for part in _TAGS.split(text):
        if _TAGS.fullmatch(part):
            yield "mark", part
            separators += part == "|special_token|"
            style = "answer" if part == "<answer>" or (part == "|special_token|" and separators == 2) else ""
        elif len(part) <= longest:
            yield style, part
        else:
            yield style, part[: longest // 3]
            yield "cut", f"\n… {len(part) - longest:,} characters …\n"
            yield style, part[longest // 3 - longest :]


def chips(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known of a sample beside its text."""
    for name in ("reward", "advantage"):
        if is_number(row.get(name)):
            yield name, f"{row[name]:+.2f}" if name == "advantage" else format_number(row[name])
    for name, value in row.items():
        is_shown = name not in ("step", "prompt", "completion", "reward", "advantage")
        if is_shown and (is_number(value) or isinstance(value, str)) and (name != "finish_reason" or value == "length"):
            yield name.removesuffix("_reason"), format_number(value)[:40]


def load_run(run_dir: Path) -> RunData:
    """From config.yaml, summary.json, */metrics.jsonl and */samples/*.parquet; ValueError where there is none."""
    if not run_dir.is_dir():
        raise ValueError(f"run directory: got {str(run_dir)!r}, which is no directory; give the --output-dir of a run")
    try:
        run = RunData.model_validate(json.loads(_read(run_dir / "summary.json")))
    except (ValueError, RecursionError):  # cut short by a full disk or a kill: the stages' own records still tell
        run = RunData(stages=_records(run_dir))
    if not run.stages:
        text = "no summary.json and no <stage>/metrics.jsonl in it; give the --output-dir of a run that has started"
        raise ValueError(f"run directory {str(run_dir)!r}: {text}")
    run.recipe = run.recipe or run_dir.resolve().name
    run.config_text = _read(run_dir / "config.yaml")
    for stage in run.stages:
        stage.read(run_dir / stage.name)
    return run


def _records(run_dir: Path) -> list[StageData]:
    """The stages that have a folder, by their stage.json, the stage's part of summary.json."""
    found = [*run_dir.glob("*/metrics.jsonl"), *run_dir.glob("*/stage.json")]
    stages = []
    for folder in dict.fromkeys(path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)):
        try:
            stages.append(StageData.model_validate(json.loads(_read(folder / "stage.json"))["entry"]))
        except (ValueError, RecursionError, KeyError, TypeError):
            stages.append(StageData(name=folder.name, status="stopped"))
    return stages


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_table(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, list) and row and all(map(is_number, row)) for row in rows)


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line, in order; of a step written twice (a resume) the last line counts."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _read(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the half line of a killed writer, or damage
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows[int(row["step"])] = row
    return dict(sorted(rows.items()))


def _read_samples(directory: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """The first, a middle and the last file of samples: (step, a few rows from the best reward to the worst)."""
    paths = sorted(directory.glob("*.parquet"))
    if not paths:
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = []
    for i in sorted({0, (len(paths) - 1) // 2, len(paths) - 1}):
        try:
            rows = pq.read_table(paths[i]).to_pylist()
        except (pa.ArrowException, OSError):  # cut short by a kill: the other files still tell
            continue
        rows.sort(key=lambda row: -row["reward"] if is_number(row.get("reward")) else float("inf"))
        count = min(SAMPLES_PER_FILE, len(rows))
        chosen = [rows[j * (len(rows) - 1) // max(1, count - 1)] for j in range(count)]
        samples.append((int("".join(filter(str.isdigit, paths[i].stem)) or 0), chosen))
    return samples
