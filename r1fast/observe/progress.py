"""The terminal: a bar over the chain's stages, a bar over the stage's steps, live key numbers and a curve.

On a terminal it is one live block at the bottom; elsewhere (a log file, CI) it is plain lines. Then the final table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from r1fast.observe.formats import format_number, format_percent, format_seconds, interval, losses, score, shares

# Label -> metric names that carry it, best first, in reading order.
KEY_METRICS = {
    "reward": ("reward",),
    "accuracy": ("rewards/accuracy/mean", "accuracy"),
    "language": ("rewards/language/mean",),
    "loss": ("loss",),
    "kl": ("kl",),
    "length": ("completions/mean_length",),
    "lr": ("learning_rate",),
    "tok/s": ("tokens_per_second",),
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_MARKS = {"done": ("✓", "green"), "running": ("●", "cyan"), "failed": ("✗", "red"), "stopped": ("■", "yellow")}
_MARKS["pending"] = ("·", "dim")
_active: list["ChainProgress"] = []


def active_progress() -> "ChainProgress | None":
    """The display that is open: a process has one terminal, so stages need not pass it around."""
    return _active[-1] if _active else None


def key_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The key metrics that are present, by label."""
    found: dict[str, float] = {}
    for label, name in ((label, name) for label, names in KEY_METRICS.items() for name in names):
        if (value := score(metrics, name)) is not None:
            found.setdefault(label, value)
    return found


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The curve of values in `width` characters; each is the mean of its share of the steps."""
    means = np.array([share.mean() for share in np.array_split(values, min(width, len(values)))])
    scale = (len(_BLOCKS) - 1) / (np.ptp(means) or 1.0)
    return "".join(_BLOCKS[round(height)] for height in (means - means.min()) * scale)


class _Clock(ProgressColumn):
    """Of the chain the time since it began, of a stage the time that it still needs."""

    def render(self, task: Task) -> Text:
        if task.fields["is_chain"]:
            return Text(format_seconds(task.elapsed), "dim")
        left = task.time_remaining
        return Text("" if left is None else f"{format_seconds(left)} left", "dim")


class ChainProgress:
    """The display of one chain, on stderr by default.

    with ChainProgress(["base", "zero"], title="tiny", is_main=dist.rank == 0) as progress:
        progress.start_stage("base", "pretrain")        # then StageLog feeds the steps
        progress.finish_stage("base", seconds=57.0, evaluation={"pass@1": 0.08})
    """

    def __init__(
        self, stages: Sequence[str], *, title: str = "", is_main: bool = True, console: Console | None = None
    ) -> None:
        self.title, self.is_main = title, is_main
        self.console = console or Console(stderr=True, highlight=False)
        self.status = dict.fromkeys(stages, "pending")
        self.label = ""  # of the stage that runs
        self.numbers: dict[str, float] = {}
        self.curve: list[float] = []
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Clock()]
        # The time left is estimated from all of a stage's steps: some take minutes.
        self._bars = Progress(*columns, auto_refresh=False, speed_estimate_period=1e9)
        self._chain = self._bars.add_task("chain", total=len(stages), is_chain=True)
        self._total_steps: int | None = None
        self._steps: TaskID | None = None
        live = is_main and self.console.is_terminal
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True) if live else None

    def start_stage(self, name: str, kind: str) -> None:
        """Name the stage that runs now."""
        self.label = f"{name} ({kind})" if kind != name else name
        self.status[name] = "running"
        self._steps = self._bars.add_task(self.label, total=None, is_chain=False)
        self._plain(f"{self.label} starts")

    def begin_steps(self, total_steps: int | None, done: int = 0) -> None:
        """The stage's steps begin (after its set-up), `done` of them before a resume."""
        self._total_steps, self.numbers, self.curve = total_steps, {}, []
        if self._steps is not None:
            self._bars.reset(self._steps, total=total_steps, completed=done)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step is done."""
        self.numbers = key_numbers(metrics)
        self.curve += [self.numbers[label] for label in ("reward", "loss") if label in self.numbers][:1]
        if self._steps is not None:
            self._bars.update(self._steps, completed=step)
        count = f"{step}/{self._total_steps}" if self._total_steps else str(step)
        numbers = "  ".join(f"{label} {format_number(value)}" for label, value in self.numbers.items())
        self._plain(f"{self.label} {count}  {numbers}".rstrip())

    def finish_stage(
        self,
        name: str,
        *,
        status: str = "done",
        seconds: float | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Close a stage; prints one line that stays."""
        label = self.label if self.status[name] == "running" else name
        self.status[name] = status
        if self._steps is not None:
            self._bars.remove_task(self._steps)
        self._steps, self.numbers, self.curve = None, {}, []
        if not self.is_main:
            return
        mark, colour = _MARKS[status]
        line = Text.assemble((f"{mark} ", colour), (label, "bold"), f"  {status}")
        if seconds is not None:
            line.append(f"  {format_seconds(seconds)}", "dim")
        for key in ("pass@1", "language", "format"):
            if (value := score(evaluation, key)) is not None:
                line.append(f"  {key} ").append(format_percent(value), "bold")
        for loss in losses(evaluation):
            line.append(f"  {loss}", "red")
        self.console.print(line, soft_wrap=True)

    def message(self, text: str) -> None:
        """One line that stays, above the live block."""
        if self.is_main:
            self.console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> "ChainProgress":
        _active.append(self)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        _active.remove(self)

    def _plain(self, line: str) -> None:
        if self._live is None:
            self.message(line)

    def __rich__(self) -> RenderableType:
        """Drawn four times a second by rich's own thread."""
        self._bars.update(self._chain, completed=list(self.status.values()).count("done"))
        marks = Text(f"{self.title}  " if self.title else "", "bold")
        for name, status in self.status.items():
            mark, colour = _MARKS[status]
            marks.append(f"{mark} {name}  ", "bold cyan" if status == "running" else f"not bold {colour}")
        line, numbers, curve = Text(), dict(self.numbers), list(self.curve)
        main = "reward" if "reward" in numbers else "loss"
        if curve and main in numbers:
            line.append(f"{main} ", "dim").append(sparkline(curve), "cyan")
            line.append(f" {format_number(numbers.pop(main))}", "bold")
        for label, value in numbers.items():
            line.append(f"   {label} ", "dim").append(format_number(value))
        return Group(marks, self._bars, *([line] if line else []))


_CHANGING = ("pass@1", "language")  # of which the score before stands there too
_LOSSES = ("failures", "unscorable")  # counts, where there are any


def print_summary(summary: Mapping[str, Any]) -> None:
    """The chain's result on stdout; in a file it has the room that its columns need."""
    console = Console()
    (console if console.is_terminal else Console(width=132)).print(summary_table(summary))


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One row per stage, from summary.json; all scores are percentages; columns without content are left out."""
    stages = summary.get("stages") or []
    title = f"{summary.get('recipe') or 'run'}: scores in %{_sample_size(stages)}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.caption, table.caption_justify = f"total {format_seconds(summary.get('seconds'))}", "left"
    table.add_column("stage", overflow="fold", style="bold")
    table.add_column("kind", overflow="fold")
    measured = shares(stage.get("eval_after") or {} for stage in stages)
    names = ["CI", *(name for name in measured if name not in ("pass@1", "greedy")), *_LOSSES]
    rows = [_scores(stage, ["pass@1", *names]) for stage in stages]
    used = ["pass@1", *(name for name in names if any(row[name] for row in rows))]
    for heading in ("time", *used):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, row in zip(stages, rows):
        name = Text(stage["name"])
        if (status := stage["status"]) != "done":
            name.append(f" {status}", _MARKS.get(status, _MARKS["pending"])[1])
        seconds = format_seconds(stage["seconds"]) if stage.get("seconds") is not None else ""
        table.add_row(name, stage["kind"], seconds, *(row[key] for key in used))
    return table


def _sample_size(stages: Sequence[Mapping[str, Any]]) -> str:
    """What pass@1 was measured on, if every stage was measured alike."""
    evaluations = [evaluation for stage in stages if (evaluation := stage.get("eval_after"))]
    found = {tuple(evaluation.get(key) for key in ("n", "k", "temperature")) for evaluation in evaluations}
    if len(found) != 1 or None in (size := found.pop()):
        return ""
    return f" ({size[0]} prompts, {size[1]} samples each, temperature {format_number(size[2])})"


def _scores(stage: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    before, after = stage.get("eval_before") or {}, stage.get("eval_after") or {}
    row = {}
    for key in names:
        shown = [score(evaluation, key) for evaluation in ((before, after) if key in _CHANGING else (after,))]
        texts = [format_percent(value) for value in shown if value is not None]
        row[key] = " → ".join(texts) if shown[-1] is not None else ""
    bounds = interval(after)
    row["CI"] = "–".join(map(format_percent, bounds)) if bounds else ""
    return row | {key: format_number(int(count)) if (count := score(after, key)) else "" for key in _LOSSES}
