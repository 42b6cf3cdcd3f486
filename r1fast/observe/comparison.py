"""Several runs on one page: their scores side by side with the differences, their curves over each other, and which of
their settings differ. The first run is what the others are compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1fast.observe.charts import DotChart, score_chart
from r1fast.observe.formats import format_seconds
from r1fast.observe.page import curve, flat, short_name, template
from r1fast.observe.run_files import RunData, StageData, load_run
from r1fast.observe.scores import Score, ScoreGroup, are_shares, group_scores, setting_of
from r1fast.run_folder import replace_file

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c7", "c8", "c9")  # of runs, which are no more


@dataclass
class ComparedScores:
    """What all runs scored in one setting."""

    group: ScoreGroup  # of the first run that has it: its words
    charts: list[DotChart]
    rows: list[tuple[str, str, list[str], list[tuple[str, str]]]]  # model, metric, values, (difference, up or down)


def build_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page of these runs to `path`, whole; ValueError for a folder that is no run, OSError."""
    folders = [folder.resolve() for folder in run_dirs]
    if twice := [str(folder) for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"{twice[0]} is given twice; name different runs")
    if len(folders) > len(COLOURS):
        raise ValueError(f"got {len(folders)} runs, at most {len(COLOURS)} can be told apart on a page")
    runs = [load_run(folder) for folder in run_dirs]
    names = [run.folder for run in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    replace_file(path, render(dict(zip(names, runs))).encode(errors="replace"))
    return path


def render(runs: dict[str, RunData]) -> str:
    """The page as text; runs by the names they go by on it."""
    colours = dict(zip(runs, COLOURS))
    curves = overlaid(runs, colours)
    return str(template("comparison.html.jinja").render(
        runs=runs, colours=colours, scores=compared_scores(runs, colours), settings=different_settings(runs),
        times=stage_times(runs), stages=curves, data={"stages": curves, "samples": []},
    ))  # fmt: skip


def compared_scores(runs: dict[str, RunData], colours: dict[str, str]) -> list[ComparedScores]:
    """For each setting in which any run was evaluated."""
    found: dict[tuple[str, ...], dict[str, ScoreGroup]] = {}
    for name, run in runs.items():
        for group in group_scores(run.entries):
            setting = setting_of(next(iter(group.rows.values())))
            found.setdefault(setting, {})[name] = group
    compared = []
    for groups in found.values():
        models = dict.fromkeys(model for group in groups.values() for model in group.rows)
        charts, rows = [], []
        for metric in dict.fromkeys(metric for group in groups.values() for metric in group.metrics):
            scores = {name: group.scores(metric) for name, group in groups.items()}
            is_share = are_shares(score for by_model in scores.values() for score in by_model.values())
            drawn = []
            for model in models:
                here = [name for name in scores if model in scores[name]]
                labels = [short_name(model), *[""] * len(here)]  # once: the colours tell the runs
                drawn += [(label, colours[name], scores[name][model]) for label, name in zip(labels, here)]
            charts.append(score_chart(metric, drawn, is_share))
            for model in models:
                found_here = [scores.get(name, {}).get(model) for name in runs]
                values = ["–" if score is None else score.text(is_share) for score in found_here]
                label = f"{metric} %" if is_share else metric
                rows.append((short_name(model), label, values, _differences(found_here, is_share)))
        compared.append(ComparedScores(next(iter(groups.values())), charts, rows))
    return compared


def _differences(scores: Sequence[Score | None], is_share: bool) -> list[tuple[str, str]]:
    """Of every run but the first, minus the first."""
    first, *others = scores
    found = []
    for score in others:
        if score is None or first is None:
            found.append(("", ""))
            continue
        difference = score.minus(first)
        certain = difference.half is not None and abs(difference.value) > difference.half
        sign = "+" if difference.value >= 0 else ""
        found.append((sign + difference.text(is_share), ("up" if difference.value > 0 else "down") if certain else ""))
    return found


def different_settings(runs: dict[str, RunData]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each run), of keys that are not the same in all."""
    by_run = []
    for run in runs.values():
        stages = {stage.name: stage.settings for stage in run.stages if stage.settings}
        outside = {key: value for key, value in run.settings.items() if key != "stages"}
        by_run.append(dict(flat({**outside, "seed": run.seed, **stages})))
    keys = dict.fromkeys(key for settings in by_run for key in settings)
    rows = [(key, [settings.get(key, "–") for settings in by_run]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def stage_times(runs: dict[str, RunData]) -> list[tuple[str, list[str]]]:
    """(stage, in each run its time, and what it came to)."""
    names = dict.fromkeys(stage.name for run in runs.values() for stage in run.stages if stage.begun)
    rows = []
    for name in names:
        found = [[stage for stage in run.stages if stage.name == name and stage.begun] for run in runs.values()]
        rows.append((name, [_came_to(stages[0]) if stages else "–" for stages in found]))
    return rows


def _came_to(stage: StageData) -> str:
    status = [stage.status] if stage.status != "done" else []
    return ", ".join([format_seconds(stage.seconds), *status, *stage.outcome])


def overlaid(runs: dict[str, RunData], colours: dict[str, str]) -> list[dict[str, Any]]:
    """By stage and metric a line for each run that has it."""
    num_curves = sum(len(stage.curves) for run in runs.values() for stage in run.stages)
    stages: dict[str, dict[str, list[Any]]] = {}
    for name, run in runs.items():
        for stage in run.stages:
            for metric in stage.curves:
                line = curve(stage, metric, num_curves, colours[name], name)
                stages.setdefault(stage.name, {}).setdefault(metric, []).append(line)
    return [{"name": name, "curves": curves, "load": []} for name, curves in stages.items()]
