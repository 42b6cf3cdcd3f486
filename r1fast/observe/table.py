"""The chain's result on the console: a table of the stages, and one of scores for each setting they are measured in."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1fast.observe.formats import format_seconds
from r1fast.observe.scores import ScoreGroup, entries_of, group_scores, losses, outcome

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow", "pending": "dim"}
WIDTH = 132  # in a file
AS_IT_IS: dict[str, Any] = {"markup": False, "emoji": False}  # names may have [brackets] and :colons:


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """All tables of summary.json, on stdout by default."""
    console = console or Console(**AS_IT_IS)
    if not console.is_terminal:
        console = Console(file=console.file, width=max(WIDTH, console.width), **AS_IT_IS)
    stages = summary.get("stages") or []
    console.print(stage_table(summary))
    for group in group_scores(entries_of(stages)):
        for table in score_tables(group, console.width):
            console.print(table)


def stage_table(summary: Mapping[str, Any]) -> Table:
    """One row per stage: its time, what it kept or measured on held-out rows, and what to know about its scores."""
    stages = summary.get("stages") or []
    table = _table(str(summary.get("recipe") or "run"))
    table.caption, table.caption_justify = f"total {format_seconds(summary.get('seconds'))}", "left"
    table.add_column("stage", overflow="fold", style="bold")
    table.add_column("kind", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for stage in stages:
        name = Text(stage["name"])
        if (status := stage["status"]) != "done":
            name.append(f" {status}", COLOURS.get(status, COLOURS["pending"]))
        seconds = format_seconds(stage["seconds"]) if stage.get("seconds") is not None else ""
        result = [*outcome(stage.get("numbers") or {}), *losses(stage.get("eval_after"))]
        table.add_row(name, stage["kind"], seconds, ", ".join(result))
    return table


def score_tables(group: ScoreGroup, width: int) -> Iterator[Table]:
    """The scores of one setting, a row per model; in more than one table where `width` has no room for all metrics."""
    names = max(len(name) for name in group.rows)
    cells = {metric: [_cell(group, metric, name) for name in group.rows] for metric in group.metrics}
    wide = {metric: max(len(metric) + 2, *map(len, texts)) for metric, texts in cells.items()}
    for j, part in enumerate(_parts(wide, width - min(names, 40) - 3)):
        table = _table(f"{group.files}: {group.how}" if j == 0 else "")
        table.add_column("model", overflow="fold", style="bold", max_width=40)
        for metric in part:
            table.add_column(f"{metric} %" if group.is_share(metric) else metric, justify="right", overflow="fold")
        for i, name in enumerate(group.rows):
            table.add_row(name, *(cells[metric][i] for metric in part))
        yield table


def _cell(group: ScoreGroup, metric: str, name: str) -> str:
    score = group.scores(metric).get(name)
    return "" if score is None else score.text(group.is_share(metric))


def _parts(wide: Mapping[str, int], room: int) -> Iterator[Sequence[str]]:
    """Metrics in runs that fit, at least one each."""
    part: list[str] = []
    used = 0
    for metric, size in wide.items():
        if part and used + size + 3 > room:
            yield part
            part, used = [], 0
        part.append(metric)
        used += size + 3  # and what is between columns
    if part:
        yield part


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
