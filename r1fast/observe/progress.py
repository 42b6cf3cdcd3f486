"""The terminal: a bar over the chain's stages, a bar over the stage's steps, live key numbers and a curve.

On a terminal it is one live block at the bottom; elsewhere (a log file, CI) it is plain lines, with the time since the
stage's first step and the time left, at most one of steps every few seconds.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from r1fast.observe.formats import format_number, format_seconds
from r1fast.observe.scores import Evaluation, first_of_step, losses, number_of, said
from r1fast.observe.table import COLOURS

LINE_SECONDS = 5.0  # between two lines of steps, outside a terminal
_LABELS = {"completions/mean_length": "length", "learning_rate": "lr", "tokens_per_second": "tok/s"}
_ON_THE_PAGE = ("entropy", "grad_norm")  # alone: a line has little room
_BLOCKS = "▁▂▃▄▅▆▇█"
_MARKS = {"done": "✓", "running": "●", "failed": "✗", "stopped": "■", "pending": "·"}
_active: list["ChainProgress"] = []


def active_progress() -> "ChainProgress | None":
    """The display that is open: a process has one terminal, so stages need not pass it around."""
    return _active[-1] if _active else None


def key_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a line has room for of a step's metrics, by label; each reward goes by its own name."""
    found: dict[str, float] = {}
    for name in [*first_of_step(metrics), "tokens_per_second"]:
        if name not in _ON_THE_PAGE and (value := number_of(metrics, name)) is not None:
            found[_LABELS.get(name, name.removeprefix("rewards/").removesuffix("/mean"))] = value
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

    with ChainProgress(["base", "zero"], title="mine", is_main=dist.rank == 0) as progress:
        progress.start_stage("base", "pretrain")        # then StageLog feeds the steps
        progress.finish_stage("base", seconds=57.0, evaluation={"pass@1": 0.08})
    """

    def __init__(
        self, stages: Sequence[str], *, title: str = "", is_main: bool = True, console: Console | None = None
    ) -> None:
        self.title, self.is_main = title, is_main
        self.console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.status = dict.fromkeys(stages, "pending")
        self.label = ""  # of the stage that runs
        self.numbers: dict[str, float] = {}
        self.curve: list[float] = []
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Clock()]
        # The time left is estimated from all of a stage's steps: some take minutes.
        self._bars = Progress(*columns, auto_refresh=False, speed_estimate_period=1e9)
        self._chain = self._bars.add_task("chain", total=len(stages), is_chain=True)
        self._total_steps: int | None = None
        self._done_before = 0  # steps that an earlier process took
        self._began = self._last_line = time.monotonic()
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
        self._total_steps, self._done_before, self.numbers, self.curve = total_steps, done, {}, []
        self._began, self._last_line = time.monotonic(), float("-inf")
        if self._steps is not None:
            self._bars.reset(self._steps, total=total_steps, completed=done)

    def step(self, step: int, metrics: Mapping[str, Any] | None) -> None:
        """One step is done. metrics: what is said of it; None: nothing."""
        if self._steps is not None:
            self._bars.update(self._steps, completed=step)
        if metrics is None:
            return
        self.numbers = key_numbers(metrics)
        self.curve += [self.numbers[label] for label in ("reward", "loss") if label in self.numbers][:1]
        now = time.monotonic()
        if step == self._total_steps or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            numbers = "".join(f"  {label} {format_number(value)}" for label, value in self.numbers.items())
            self._plain(f"{self.label} {self._where(step, now - self._began)}{numbers}")

    def _where(self, step: int, seconds: float) -> str:
        """12/60  1 m 12 s, 4 m 48 s left: estimated from all steps of this process, as some take minutes."""
        total, taken = self._total_steps, step - self._done_before
        if not total:
            return f"{step}  {format_seconds(seconds)}"
        left = f", {format_seconds(seconds / taken * (total - step))} left" if taken > 0 and step < total else ""
        return f"{step}/{total}  {format_seconds(seconds)}{left}"

    def finish_stage(
        self,
        name: str,
        *,
        status: str = "done",
        seconds: float | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Close a stage; prints a line that stays, and one more for each file that it was evaluated on."""
        label = self.label if self.status[name] == "running" else name
        self.status[name] = status
        if self._steps is not None:
            self._bars.remove_task(self._steps)
        self._steps, self.numbers, self.curve = None, {}, []
        if not self.is_main:
            return
        line = Text.assemble((f"{_MARKS[status]} ", COLOURS[status]), (label, "bold"), f"  {status}")
        if seconds is not None:
            line.append(f"  {format_seconds(seconds)}", "dim")
        scores = said(evaluation or {})
        if len(scores) == 1:
            line.append(f"  {scores[0]}")
        for loss in losses(evaluation):
            line.append(f"  {loss}", "red")
        self.console.print(line, soft_wrap=True)
        for text in scores if len(scores) > 1 else ():
            self.message(f"    {text}")

    def message(self, text: str) -> None:
        """One line that stays, above the live block."""
        if self.is_main:
            self.console.print(text, markup=False, emoji=False, soft_wrap=True)

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
            style = f"{'' if status == 'running' else 'not '}bold {COLOURS[status]}"
            marks.append(f"{_MARKS[status]} {name}  ", style)
        line, numbers, curve = Text(), dict(self.numbers), list(self.curve)
        main = "reward" if "reward" in numbers else "loss"
        if curve and main in numbers:
            line.append(f"{main} ", "dim").append(sparkline(curve), "cyan")
            line.append(f" {format_number(numbers.pop(main))}", "bold")
        for label, value in numbers.items():
            line.append(f"   {label} ", "dim").append(format_number(value))
        return Group(marks, self._bars, *([line] if line else []))
