"""The terminal: a bar over the chain's stages, a bar over the stage's steps, live key numbers and a curve.

On a terminal it is one live block at the bottom; elsewhere (a log file, CI) it is plain lines.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r1fast.observe.formats import (
    format_number,
    format_percent,
    format_seconds,
    interval,
    is_number,
    key_numbers,
    losses,
    main_curve,
    score,
)

_BLOCKS = "▁▂▃▄▅▆▇█"
_MARKS = {
    "done": ("✓", "green"), "running": ("●", "cyan"), "failed": ("✗", "red"), "stopped": ("■", "yellow"),
    "pending": ("·", "dim"),
}  # fmt: skip
_active: list["ChainProgress"] = []


def active_progress() -> "ChainProgress | None":
    """The display that is open: a process has one terminal, so stages need not pass it around."""
    return _active[-1] if _active else None


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The curve of values in `width` characters; each is the mean of its share of the steps."""
    numbers = [float(value) for value in values if is_number(value)]
    if not numbers:
        return ""
    width = min(width, len(numbers))
    edges = [round(i * len(numbers) / width) for i in range(width + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


class ChainProgress:
    """The display of one chain.

    with ChainProgress(["base", "zero"], title="tiny", is_main=dist.rank == 0) as progress:
        progress.start_stage("base", "pretrain")        # then StageLog feeds the steps
        progress.finish_stage("base", seconds=57.0, evaluation={"pass@1": 0.08})

    console: where to draw; stderr by default.
    """

    def __init__(
        self, stages: Sequence[str], *, title: str = "", is_main: bool = True, console: Console | None = None
    ) -> None:
        self.title = title
        self.is_main = is_main
        self.console = console or Console(stderr=True, highlight=False)
        self.status = dict.fromkeys(stages, "pending")
        self.kinds: dict[str, str] = {}
        self.started = time.monotonic()
        self.stage: str | None = None
        self._reset_steps(None, 0)
        live = is_main and self.console.is_terminal
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True) if live else None

    def _reset_steps(self, total_steps: int | None, done: int) -> None:
        self.total_steps, self.first_step, self.last_step = total_steps, done, done
        self.steps_started = time.monotonic()
        self.numbers: list[tuple[str, str]] = []
        self.curve_name: str | None = None
        self.curve: list[float] = []

    def start_stage(self, name: str, kind: str = "", total_steps: int | None = None) -> None:
        """Name the stage that runs now."""
        self.stage, self.status[name], self.kinds[name] = name, "running", kind
        self._reset_steps(total_steps, 0)
        self._plain(f"{self._label(name)} starts")

    def begin_steps(self, name: str, total_steps: int | None, done: int = 0) -> None:
        """The stage's steps begin (after its set-up), `done` of them before a resume."""
        if self.stage != name:
            self.start_stage(name)
        self._reset_steps(total_steps, done)

    def step(self, step: int, total_steps: int | None, metrics: Mapping[str, Any], *, quiet: bool = False) -> None:
        """One step is done. `quiet` leaves the plain line out; the live block always follows."""
        self.last_step, self.total_steps = step, total_steps
        self.numbers = key_numbers(metrics)
        self.curve_name = self.curve_name or main_curve(metrics)
        if self.curve_name and is_number(metrics.get(self.curve_name)):
            self.curve.append(float(metrics[self.curve_name]))
        if not quiet:
            of_total = f"/{total_steps}" if total_steps else ""
            numbers = "  ".join(f"{label} {text}" for label, text in self.numbers)
            self._plain(f"{self._label(self.stage or '')} {step}{of_total}  {numbers}".rstrip())

    def finish_stage(
        self,
        name: str,
        *,
        status: str = "done",
        seconds: float | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Close a stage; prints one line that stays."""
        self.status[name] = status
        if self.stage == name:
            self.stage, self.numbers = None, []
        if not self.is_main:
            return
        mark, colour = _MARKS.get(status, _MARKS["pending"])
        line = Text.assemble((f"{mark} ", colour), (self._label(name), "bold"), f"  {status}")
        if seconds is not None:
            line.append(f"  {format_seconds(seconds)}", "dim")
        for key in ("pass@1", "language", "format"):
            if score(evaluation, key) is not None:
                line.append(f"  {key} ").append(format_percent(score(evaluation, key)), "bold")
        for loss in losses(evaluation):
            line.append(f"  {loss}", "red")
        self.console.print(line, soft_wrap=True)

    def message(self, text: str) -> None:
        """One line that stays, above the live block."""
        if self.is_main:
            self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> "ChainProgress":
        _active.append(self)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _label(self, name: str) -> str:
        kind = self.kinds.get(name, "")
        return f"{name} ({kind})" if kind and kind != name else name

    def _plain(self, line: str) -> None:
        if self.is_main and self._live is None:
            self.console.print(line, markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """Drawn four times a second by rich's own thread: reads only."""
        rows: list[RenderableType] = [self._stage_marks(), self._bars()]
        if self.numbers:
            rows.append(self._live_numbers())
        return Group(*rows)

    def _stage_marks(self) -> Text:
        marks = Text(no_wrap=False)
        if self.title:
            marks.append(f"{self.title}  ", "bold")
        for name, status in self.status.items():
            mark, colour = _MARKS.get(status, _MARKS["pending"])
            marks.append(f"{mark} {name}  ", "bold cyan" if status == "running" else colour)
        return marks

    def _bars(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=16, no_wrap=True)
        for _ in range(3):
            grid.add_column(no_wrap=True)
        done = sum(status == "done" for status in self.status.values())
        grid.add_row(
            "chain",
            ProgressBar(total=max(1, len(self.status)), completed=done, width=40, complete_style="cyan"),
            f"{done}/{len(self.status)}",
            Text(format_seconds(time.monotonic() - self.started), "dim"),
        )
        if self.stage is not None:
            steps = f"{self.last_step}/{self.total_steps}" if self.total_steps else str(self.last_step or "")
            total = self.total_steps
            bar = ProgressBar(total, self.last_step, width=40, pulse=not total, complete_style="cyan")
            grid.add_row(Text(self._label(self.stage), "bold cyan"), bar, steps, Text(self._time_left(), "dim"))
        return grid

    def _time_left(self) -> str:
        steps_done = self.last_step - self.first_step
        if not self.total_steps or steps_done < 1:
            return ""
        per_step = (time.monotonic() - self.steps_started) / steps_done
        return f"{format_seconds(per_step * (self.total_steps - self.last_step))} left"

    def _live_numbers(self) -> Text:
        line = Text()
        if self.curve_name:
            line.append(f"{self.curve_name} ", "dim").append(sparkline(self.curve), "cyan")
            line.append(f" {format_number(self.curve[-1])}", "bold")
        for label, text in self.numbers:
            if label != self.curve_name:
                line.append(f"   {label} ", "dim").append(text)
        return line


_SCORES = ("cons@k", "language", "format", "helpful", "harmless")
_LOSSES = ("failures", "unscorable")  # counts, where there are any


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The chain's result, one row per stage, from summary.json; all scores are percentages."""
    title = f"{summary.get('recipe') or 'run'}: scores in %{_sample_size(summary)}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.caption, table.caption_justify = f"total {format_seconds(summary.get('seconds'))}", "left"
    rows = [_summary_row(stage) for stage in summary.get("stages") or [] if isinstance(stage, Mapping)]
    headings = ["stage", "kind", "time", "pass@1", "CI", *_SCORES, *_LOSSES]
    used = [i for i in range(len(headings)) if i < 4 or any(row[i] for row in rows)]
    for i in used:
        if i < 2:
            table.add_column(headings[i], overflow="fold", style="bold" if i == 0 else "")
        else:
            table.add_column(headings[i], justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in used))
    return table


def _sample_size(summary: Mapping[str, Any]) -> str:
    """What pass@1 was measured on, if every stage was measured alike."""
    found = {
        (evaluation.get("n"), evaluation.get("k"), evaluation.get("temperature"))
        for stage in summary.get("stages") or []
        if isinstance(stage, Mapping) and isinstance(evaluation := stage.get("eval_after"), Mapping)
    }
    if len(found) != 1 or None in (size := found.pop()):
        return ""
    return f" ({size[0]} prompts, {size[1]} samples each, temperature {format_number(size[2])})"


def _summary_row(stage: Mapping[str, Any]) -> list[str | Text]:
    before, after = stage.get("eval_before") or {}, stage.get("eval_after") or {}
    status = stage.get("status", "done")
    name = Text(str(stage.get("name", "")))
    if status != "done":
        name.append(f" {status}", _MARKS.get(str(status), _MARKS["pending"])[1])
    bounds = interval(after)
    texts = [
        str(stage.get("kind", "")),
        format_seconds(stage.get("seconds")) if is_number(stage.get("seconds")) else "",
        _change(before, after, "pass@1"),
        f"{format_percent(bounds[0])}–{format_percent(bounds[1])}" if bounds else "",
    ]
    others = [_change(before, after, key) if key == "language" else _change({}, after, key) for key in _SCORES]
    counts = [format_number(int(score(after, key) or 0)) if score(after, key) else "" for key in _LOSSES]
    return [name, *texts, *others, *counts]


def _change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    old, new = score(before, key), score(after, key)
    if new is None:
        return ""
    return format_percent(new) if old is None else f"{format_percent(old)} → {format_percent(new)}"
