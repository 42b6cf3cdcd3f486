"""report.html: one self-contained page from a run directory, of a run that is at work, ended, or stopped anywhere.

run_files.py reads the run. The layout is page.html.jinja with parts.jinja, the style page.css; page.js draws the curves
and searches the completions, from the JSON that `page_data` puts into the page.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from r1fast.observe.charts import DotChart, chain, memory_chart, score_chart, thinned
from r1fast.observe.formats import format_bytes, format_number, format_percent, format_seconds, is_number
from r1fast.observe.run_files import PHASES, SAMPLE_COLUMNS, RunData, StageData, load_run
from r1fast.observe.scores import COUNTS, ScoreGroup, first_of_step, group_scores, losses, number_of
from r1fast.run_folder import replace_file

RELOAD_SECONDS = 60  # of the page of a run at work
LONGEST_TEXT = 6000  # characters of a prompt or completion on the page
SCORES = "c1"  # the colour of what a single run scored


def build_report(run_dir: Path, *, live: bool = False) -> Path:
    """Write RUN/report.html, whole, and return its path; ValueError as of load_run, OSError where it cannot be.

    live: the run is at work, and the page says so and reloads itself.
    """
    path = Path(run_dir) / "report.html"
    replace_file(path, render(load_run(Path(run_dir)), live=live).encode(errors="replace"))
    return path


def render(run: RunData, *, live: bool = False) -> str:
    """The page as text. Jinja escapes whatever the run says, in the JSON too."""
    groups, colours = group_scores(run.entries), phase_colours(run.stages)
    main = max(groups, key=lambda group: len(group.rows), default=None)
    return template("page.html.jinja").render(
        run=run, colours=colours, live=live, reload=RELOAD_SECONDS,
        written=time.strftime("%Y-%m-%d %H:%M:%S"), now=int(time.time()),
        groups=[(group, score_charts(group)) for group in groups], main=main, shown=first_scores(main),
        tiles=list(headline(run, main)),
        chain=chain(run.stages), memory=memory_chart(run.stages, colours), data=page_data(run),
    )  # fmt: skip


@cache
def template(name: str) -> Any:
    """A template of this folder, with the style, the script and the filters that all of them use."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": format_number, "percent": format_percent, "seconds": format_seconds, "bytes": format_bytes,
        "short": short_name, "losses": losses, "flat": flat, "first_curves": first_of_step,
        "score_tables": score_tables,
    }  # fmt: skip
    environment.globals |= {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template(name)


def phase_colours(stages: Iterable[StageData]) -> dict[str, str]:
    """The colour of each phase, in the order of a step; names that are not known get what is left."""
    names = {name for stage in stages for name in (*stage.phases, *stage.memory)}
    colours = {name: f"c{i}" for i, name in enumerate(PHASES, 1) if name in names}
    colours |= {name: f"c{7 + i % 3}" for i, name in enumerate(sorted(names - {*PHASES, "other"}))}
    return colours | ({"other": "c0"} if "other" in names else {})


def score_charts(group: ScoreGroup) -> list[DotChart]:
    """A chart for each metric of one setting."""
    charts = []
    for metric in group.metrics:
        rows = [(short_name(name), SCORES, score) for name, score in group.scores(metric).items()]
        charts.append(score_chart(metric, rows, group.is_share(metric)))
    return charts


def first_scores(group: ScoreGroup | None) -> list[str]:
    """The metrics of one setting to see first: of sampled answers, each reward."""
    others = ("greedy", "pass@k", "cons@k")
    return [name for name in group.metrics if not name.startswith(others)] if group is not None else []


def headline(run: RunData, group: ScoreGroup | None, most: int = 3) -> Iterator[dict[str, str]]:
    """The first metrics of the model that the chain is about, beside those of the model that it began with.

    It is the one with the most stages before it; students are about themselves.
    """
    if group is None:
        return
    depth: dict[str, int] = {}
    for stage in run.stages:
        depth[stage.name] = 1 + max((depth.get(name, 0) for name in stage.sources), default=0)
    kinds = {stage.name: stage.kind for stage in run.stages}
    trained = [name for name in group.rows if name in kinds] or list(group.rows)
    names = [name for name in trained if kinds.get(name) != "distill"] or trained
    last, first = max(reversed(names), key=lambda name: depth.get(name, 0)), next(iter(group.rows))
    for metric in first_scores(group)[:most]:
        now, was = group.scores(metric).get(last), group.scores(metric).get(first)
        if now is not None:
            is_share = group.is_share(metric)
            value, _, half = now.text(is_share).partition(" ")
            unit = "%" if is_share else ""
            before = f", {was.text(is_share).partition(' ')[0]}{unit} in {short_name(first)}" if was else ""
            note = f"{last}{before}" if last != first else last
            yield {"title": metric, "value": value, "unit": unit, "half": half, "note": note}


def score_tables(stage: StageData) -> Iterator[tuple[ScoreGroup, list[tuple[str, list[str], str, str]]]]:
    """Of each setting rows of (metric, its values before and after, the change, "up" or "down" if that is certain)."""
    for group in group_scores(stage.evaluations.items()):
        rows = []
        for metric in group.metrics:
            scores, is_share = group.scores(metric), group.is_share(metric)
            texts = [scores[name].text(is_share) if name in scores else "–" for name in group.rows]
            change = way = ""
            if len(scores) == 2:
                before, after = scores.values()
                difference = after.minus(before)
                change = ("+" if difference.value >= 0 else "") + difference.text(is_share)
                certain = difference.half is not None and abs(difference.value) > difference.half
                way = ("up" if difference.value > 0 else "down") if certain else ""
            rows.append((f"{metric} %" if is_share else metric, texts, change, way))
        for count in COUNTS:
            values = [number_of(evaluation, count) for evaluation in group.rows.values()]
            if any(values):
                name = {"length": "mean length, tokens"}.get(count, count)
                rows.append((name, [format_number(value) for value in values], "", ""))
        yield group, rows


def page_data(run: RunData) -> dict[str, Any]:
    """What the page's script draws and searches."""
    num_curves = sum(len(stage.curves) for stage in run.stages)
    stages = [
        {
            "name": stage.name,
            "curves": {name: [curve(stage, name, num_curves)] for name in stage.curves},
            "load": list(stage.expert_load.values()),
        }
        for stage in run.stages
    ]
    return {"stages": stages, "samples": [sample(stage.name, row) for stage, row in run.samples]}


def curve(stage: StageData, name: str, num_curves: int, colour: str = "c1", label: str = "") -> dict[str, Any]:
    """One line of a chart: its points, and of an evaluation their intervals."""
    points, bounds = thinned(stage.curves[name], num_curves), stage.bounds.get(name)
    drawn = {"points": points, "colour": colour, "label": label}
    return drawn | ({"bounds": bounds} if bounds is not None and len(bounds) == len(points) else {})


def sample(stage: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A completion as the page shows it; `parts` are those of the reward."""
    said = {key: clipped(row[key]) for key in ("prompt", "completion", "gold") if row.get(key) is not None}
    numbers = {key: row[key] for key in ("reward", "advantage", "tokens") if is_number(row.get(key))}
    parts = {key: value for key, value in row.items() if key not in SAMPLE_COLUMNS and is_number(value)}
    is_cut = row.get("finish_reason") == "length"
    return {"stage": stage, "step": row["step"], **said, **numbers, "parts": parts, "cut": is_cut}


def clipped(text: Any) -> str:
    """A text without its middle, if it is long."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    if len(text) <= LONGEST_TEXT:
        return text
    head = LONGEST_TEXT // 3
    return f"{text[:head]}\n… {len(text) - LONGEST_TEXT:,} characters …\n{text[head - LONGEST_TEXT :]}"


def short_name(name: str) -> str:
    """The last part of a Hub id or a path: charts have little room."""
    return name.rstrip("/").rpartition("/")[2] or name


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings or numbers as lines: (dotted name, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif is_number(value) or isinstance(value, str):
            yield f"{prefix}{key}", format_number(value)
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)
