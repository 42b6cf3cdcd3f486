"""What a run's folder says, read with patience: any file may be missing, damaged, or half written by a run at work."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from r1fast.observe.formats import is_number
from r1fast.observe.scores import Evaluation, by_file, entries_of, metrics_of, outcome, score_of, setting_of

# The order of phases within a step; others come after them.
PHASES = ("generate", "reward", "logprobs", "update", "evaluate", "save")
MOST_SAMPLES = 480  # completions of a run that a page holds
# Columns of samples/*.parquet that are no part of the reward.
SAMPLE_COLUMNS = ("step", "prompt", "completion", "finish_reason", "gold", "tokens", "reward", "advantage")
_OLD_SAMPLES = {"answer": "gold"}  # as earlier versions called it


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
    best_step: int | None = None
    numbers: dict[str, Any] = {}
    phases: dict[str, float] = {}
    memory: dict[str, float] = {}
    settings: dict[str, Any] = {}
    last_step: int = 0
    curves: dict[str, list[tuple[int, float]]] = {}
    bounds: dict[str, list[tuple[float, float]]] = {}  # of curves that are evaluations: the interval of each point
    expert_load: dict[int, list[list[float]]] = {}  # step -> [L][E], 1 = even: of the first and the last that has it
    samples: list[dict[str, Any]] = []
    sampled_steps: int = 0  # that have completions in files; `samples` are of some of them

    def read(self, folder: Path) -> None:
        """What the stage's folder says, and its phases in the order of a step, what none accounts for as "other"."""
        rows = _read_metrics(folder / "metrics.jsonl")
        self.last_step = max(rows, default=0)
        for step, row in rows.items():
            for name, value in row.items():
                if name not in ("step", "time") and is_number(value):
                    self.curves.setdefault(name, []).append((step, value))
        self._add_evaluations()
        tables = [(step, row["moe/load"]) for step, row in rows.items() if _is_table(row.get("moe/load"))]
        self.expert_load = dict([*tables[:1], *tables[-1:]])
        self.phases, self.memory = _ordered(self.phases), _ordered(self.memory)
        seconds = self.seconds if is_number(self.seconds) else 0.0
        if seconds - self.total > 0.001 * seconds:
            self.phases["other"] = seconds - self.total

    def _add_evaluations(self) -> None:
        """Curves of what was evaluated under way, with the evaluations before and after if they were of one setting."""
        if not self.validations:
            return
        how = {setting_of(part) for part in by_file(self.validations[-1])}
        ends = ((0, self.eval_before), (self.last_step, self.eval_after))
        steps = {step: one for step, one in ends if one and all(setting_of(part) in how for part in by_file(one))}
        steps |= {int(one["step"]): one for one in self.validations if is_number(one.get("step"))}
        for step, evaluation in sorted(steps.items()):
            for part in (parts := list(by_file(evaluation))):
                for metric in metrics_of([part]):
                    name = f"eval/{metric}" + (f" · {part.get('split')}" if len(parts) > 1 else "")
                    if (score := score_of(part, metric)) is not None:
                        self.curves.setdefault(name, []).append((step, score.value))
                        self.bounds.setdefault(name, []).append(score.bounds)

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
    def evaluations(self) -> dict[str, Evaluation]:
        both = {"before": self.eval_before, "after": self.eval_after}
        return {name: evaluation for name, evaluation in both.items() if evaluation}

    @property
    def outcome(self) -> list[str]:
        return outcome(self.numbers)

    @property
    def counts(self) -> list[tuple[str, int, str]]:
        """What a selecting stage kept, and what it dropped for which reason, with the colour of each."""
        numbers, dropped = self.numbers, self.numbers.get("dropped")
        if not isinstance(dropped, dict):
            return []
        kept = [("kept", int(numbers["kept"]), "c3")] if is_number(numbers.get("kept")) else []
        reasons = [(name.replace("_", " "), int(count), "c2") for name, count in dropped.items() if is_number(count)]
        return kept + sorted(reasons, key=lambda reason: -reason[1])

    @property
    def free_numbers(self) -> dict[str, Any]:
        """The stage's numbers, without those that `counts` has."""
        return {key: self.numbers[key] for key in self.numbers if not (self.counts and key in ("kept", "dropped"))}


class RunData(BaseModel):
    """summary.json, and the text of config.yaml."""

    folder: str = ""
    recipe: str = ""
    started: str = ""
    machine: dict[str, Any] = {}
    seed: int | None = None
    seconds: float | None = None
    stages: list[StageData] = []
    settings: dict[str, Any] = {}
    config_text: str = ""

    @property
    def entries(self) -> list[tuple[str, Evaluation | None]]:
        """(model, evaluation), in the chain's order."""
        return list(entries_of(stage.model_dump(include=_OF_ENTRIES) for stage in self.stages))

    @property
    def samples(self) -> list[tuple[StageData, dict[str, Any]]]:
        return [(stage, row) for stage in self.stages for row in stage.samples]


_OF_ENTRIES = {"name", "model", "eval_before", "eval_after"}


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
    run.folder = run_dir.resolve().name
    run.recipe = run.recipe or run.folder
    run.config_text = _read(run_dir / "config.yaml")
    for stage in run.stages:
        stage.read(run_dir / stage.name)
    _read_samples(run_dir, run.stages)
    return run


def _ordered(values: Mapping[str, Any]) -> dict[str, float]:
    given = {name: value for name, value in values.items() if is_number(value) and value > 0}
    return {name: given[name] for name in (*PHASES, *given) if name in given}


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


def _read_samples(run_dir: Path, stages: Iterable[StageData]) -> None:
    """Completions of each stage, of files that are evenly spread and as many as there is room for."""
    files = {stage.name: sorted((run_dir / stage.name / "samples").glob("*.parquet")) for stage in stages}
    num_stages = sum(bool(paths) for paths in files.values())
    for stage in stages:
        room, paths = MOST_SAMPLES // max(num_stages, 1), files[stage.name]
        chosen, stage.sampled_steps = _spread(paths, max(1, room // 8)), len(paths)
        for path in chosen:
            step = int("".join(filter(str.isdigit, path.stem)) or 0)
            for row in _spread(_best_first(_read_table(path)), max(1, room // len(chosen))):
                renamed = {_OLD_SAMPLES.get(name, name): value for name, value in row.items()}
                stage.samples.append({"step": step, **renamed})


def _read_table(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError):  # cut short by a kill: the other files still tell
        return []


def _best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["reward"] if is_number(row.get("reward")) else float("inf"))


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // max(1, most - 1)] for i in range(most)]
