"""One stage on the page: before and after, time, what was kept, curves, sample completions, settings."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r1fast.observe.charts import count_rows, legend, line_chart, load_map, phase_bar, phase_class
from r1fast.observe.formats import format_number, format_percent, format_seconds, interval, is_number, score
from r1fast.observe.markup import Html, anchor, join, tag
from r1fast.observe.overview import stage_phases
from r1fast.observe.run_data import StageData

# Curves a person looks at first, in this order; the rest is one click away.
_FIRST_CURVES = (
    r"reward",
    r"rewards/.*/mean",
    r"eval/.*",
    r"loss",
    r"kl",
    r"completions/mean_length",
    r"entropy",
    r"language",
    r"learning_rate",
    r"grad_norm",
)
_SHARES = ("pass@1", "cons@k", "greedy", "format", "language", "helpful", "harmless")
_SAMPLE_TEXT = ("step", "prompt", "completion", "finish_reason", "reward", "advantage")
_TAGS = re.compile(r"(</?think>|</?answer>|\|special_token\||<｜[^｜<>]{1,40}｜>)")
_LONGEST = 3500


def stage_section(stage: StageData, number: int) -> Html:
    """Everything about one stage; parts without data are left out."""
    parts = [_head(stage, number), _tables(stage), _kept(stage), _curves(stage), _expert_load(stage)]
    return tag("section", *parts, _samples(stage), _settings(stage), class_="card", id=anchor(stage.name))


def _head(stage: StageData, number: int) -> Html:
    status = None if stage.status == "done" else tag("span", stage.status, class_=f"badge {stage.status}")
    seconds = format_seconds(stage.seconds) if stage.seconds is not None else None
    origin = [f"from {stage.model}"] if stage.model else []
    data = [name for name in stage.inputs if name != stage.model]
    origin += [f"with {', '.join(data)}"] if data else []
    return tag(
        "div",
        tag("h2", f"{number}. {stage.name}"),
        tag("span", stage.kind, class_="badge") if stage.kind else None,
        status,
        tag("span", " ".join(origin), class_="soft"),
        tag("span", seconds, class_="time"),
        class_="head",
    )


def _tables(stage: StageData) -> Html | None:
    """Scores on the left; the stage's own numbers and its time by phase on the right."""
    scores, rest = _scores(stage), [part for part in (_numbers(stage), _phases(stage)) if part]
    columns = [scores, tag("div", *rest)] if scores and rest else [scores, *rest]
    return tag("div", *columns, class_="columns") if any(columns) else None


def _scores(stage: StageData) -> Html | None:
    """Scores in percent; the columns are those evaluations that were made."""
    made = [(name, e) for name, e in (("before", stage.eval_before), ("after", stage.eval_after)) if e]
    rows = []
    for key in (*_SHARES, "length"):
        values = [score(evaluation, key) for _, evaluation in made]
        if any(value is not None for value in values):
            cells = [tag("td", _written(key, evaluation)) for _, evaluation in made]
            rows.append(tag("tr", tag("td", key), *cells, _delta(key, *values) if len(made) == 2 else None))
    for key in ("failures", "unscorable"):
        if any(score(evaluation, key) for _, evaluation in made):
            cells = [tag("td", format_number(evaluation.get(key))) for _, evaluation in made]
            rows.append(tag("tr", tag("td", key), *cells, tag("td", "") if len(made) == 2 else None))
    if not rows:
        return None
    names = [name for name, _ in made] + (["change"] if len(made) == 2 else [])
    head = tag("tr", *(tag("th", name) for name in ("score in %", *names)))
    return tag("div", tag("h3", "Before and after" if len(made) == 2 else "Scores"), tag("table", head, *rows))


def _written(key: str, evaluation: Mapping[str, Any]) -> str:
    value = score(evaluation, key)
    if key == "length":
        return f"{format_number(value)} tokens" if value is not None else "–"
    bounds = interval(evaluation) if key == "pass@1" else None
    return format_percent(value) + (f" ± {format_percent((bounds[1] - bounds[0]) / 2)}" if bounds else "")


def _delta(key: str, old: float | None, new: float | None) -> Html:
    if old is None or new is None:
        return tag("td", "")
    if key == "length":
        return tag("td", f"{new - old:+.1f}")
    points = round(100 * (new - old), 1)
    return tag("td", f"{points:+.1f}", class_="up" if points > 0 else "down" if points < 0 else None)


def _numbers(stage: StageData) -> Html | None:
    """Free numbers that the stage reports; the count of dropped rows has its own chart."""
    flat = _flatten({key: value for key, value in stage.numbers.items() if not _is_counts(stage, key)})
    return tag("div", tag("h3", "Numbers"), _pairs(flat)) if flat else None


def _is_counts(stage: StageData, key: str) -> bool:
    return key in ("kept", "dropped") and isinstance(stage.numbers.get("dropped"), dict)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        elif is_number(value):
            flat.append((f"{prefix}{key}", format_number(value)))
        else:
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat.append((f"{prefix}{key}", written))
    return flat


def _pairs(pairs: Iterable[tuple[str, str]]) -> Html:
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in pairs), class_="pairs")


def _phases(stage: StageData) -> Html | None:
    if not stage.phases:
        return None
    phases = stage_phases(stage)
    total = sum(phases.values())
    entries = [(phase_class(name, list(phases)), f"{name} {seconds / total:.0%}") for name, seconds in phases.items()]
    return tag("div", tag("h3", "Time by phase"), legend(entries), phase_bar(phases))


def _kept(stage: StageData) -> Html | None:
    """What a selecting stage kept, and what it dropped for which reason."""
    dropped = stage.numbers.get("dropped")
    if not isinstance(dropped, dict):
        return None
    kept = stage.numbers.get("kept")
    rows = [("kept", int(kept), "c3")] if is_number(kept) else []
    reasons = [(str(name), int(count)) for name, count in dropped.items() if is_number(count)]
    rows += [(name, count, "c2") for name, count in sorted(reasons, key=lambda reason: -reason[1])]
    return join(tag("h3", "Kept and dropped"), tag("div", count_rows(rows), class_="scroll")) if rows else None


def _curves(stage: StageData) -> Html | None:
    ordered: list[str] = []
    for pattern in _FIRST_CURVES:
        ordered += [name for name in stage.curves if re.fullmatch(pattern, name) and name not in ordered]
    rest = sorted(name for name in stage.curves if name not in ordered)
    if not ordered:
        ordered, rest = rest, []
    if not ordered:
        return None
    more = tag("details", tag("summary", f"{len(rest)} more curves"), _chart_grid(stage, rest)) if rest else None
    return join(tag("h3", "Curves"), _chart_grid(stage, ordered), more)


def _chart_grid(stage: StageData, names: Sequence[str]) -> Html:
    figures = []
    for name in names:
        points = stage.curves[name]
        caption = tag("figcaption", tag("span", name, title=name), tag("span", format_number(points[-1][1])))
        figures.append(tag("figure", caption, line_chart(name, points)))
    return tag("div", *figures, class_="curves")


def _expert_load(stage: StageData) -> Html | None:
    """Which experts of each layer the tokens went to, at the first and the last step."""
    if not stage.expert_load:
        return None
    steps = dict([stage.expert_load[0], stage.expert_load[-1]])
    maps = [tag("figure", tag("figcaption", f"step {step}"), load_map(load)) for step, load in steps.items()]
    key = legend([("c1", "less than an even share"), ("c2", "more")])
    return join(tag("h3", "Load of experts, by layer"), tag("div", *maps, class_="columns"), key)


def _samples(stage: StageData) -> Html | None:
    if not stage.samples:
        return None
    folds = []
    for i, (step, rows) in enumerate(stage.samples):
        cards = tag("div", *(_sample(row) for row in rows), class_="samples")
        is_last = i == len(stage.samples) - 1
        folds.append(tag("details", tag("summary", f"Step {step}"), cards, open="" if is_last else None))
    return join(tag("h3", "Sample completions"), *folds)


def _sample(row: Mapping[str, Any]) -> Html:
    chips = [_chip(name, row[name]) for name in ("reward", "advantage") if is_number(row.get(name))]
    others = [name for name in row if name not in _SAMPLE_TEXT]
    chips += [_chip(name, row[name]) for name in others if is_number(row[name])]
    chips += [_chip(name, str(row[name])[:40]) for name in others if isinstance(row[name], str)]
    if row.get("finish_reason") == "length":
        chips.append(_chip("finish", "length"))
    prompt, completion = row.get("prompt"), row.get("completion")
    return tag(
        "div",
        tag("div", *chips, class_="chips") if chips else None,
        tag("pre", *_shorten(str(prompt).strip(), 900), class_="prompt") if prompt else None,
        tag("pre", highlight(str(completion))) if completion is not None else None,
        class_="sample",
    )


def _chip(name: str, value: Any) -> Html:
    signed = name == "advantage" and is_number(value)
    written = f"{value:+.2f}" if signed else format_number(value) if is_number(value) else value
    colour = ("up" if value > 0 else "down" if value < 0 else None) if signed else None
    return tag("span", f"{name} ", tag("b", written, class_=colour))


def _shorten(content: str, longest: int) -> list[str | Html]:
    """A long text without its middle: the question of a prompt and the answer of a completion stand at the end."""
    if len(content) <= longest:
        return [content]
    head, tail = longest // 3, longest - longest // 3
    cut = tag("span", f"\n… {len(content) - longest:,} characters …\n", class_="cut")
    return [content[:head], cut, content[-tail:]]


def highlight(completion: str) -> Html:
    """A completion with its tags marked, and the answer strong against the reasoning."""
    parts: list[Html] = []
    in_answer, separators = False, 0
    for piece in _TAGS.split(completion):
        if _TAGS.fullmatch(piece):
            separators += piece == "|special_token|"
            in_answer = piece == "<answer>" or (piece == "|special_token|" and separators == 2)
            parts.append(tag("span", piece, class_="mark"))
        elif piece:
            shown = _shorten(piece, _LONGEST)
            parts.append(tag("span", *shown, class_="answer") if in_answer else join(*shown))
    return join(*parts)


def _settings(stage: StageData) -> Html | None:
    if not stage.settings:
        return None
    return tag("details", tag("summary", "Settings"), _pairs(_flatten(stage.settings)))
