"""The top of the page: what ran, the result in four numbers, the chain, scores and time by stage."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from r1fast.observe.charts import PHASE_CLASSES, legend, phase_class, score_bars, time_rows
from r1fast.observe.formats import format_percent, format_seconds, interval, is_number, losses, score, short_name
from r1fast.observe.graph import chain_graph
from r1fast.observe.markup import Html, join, tag
from r1fast.observe.run_data import RunData, StageData


def page_header(run: RunData) -> Html:
    """Recipe, start, machine, seed, wall time."""
    summary = run.summary
    facts = [("started", _when(summary.get("started"))), ("seed", summary.get("seed"))]
    facts += [("wall time", format_seconds(summary.get("seconds")) if is_number(summary.get("seconds")) else None)]
    facts += [(str(key), value) for key, value in _machine(summary.get("machine"))]
    shown = [tag("span", f"{name} ", tag("b", str(value))) for name, value in facts if value not in (None, "")]
    return tag("header", tag("h1", f"{run.recipe}"), tag("div", *shown, class_="facts"))


def _when(value: Any) -> str | None:
    if is_number(value):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(value)[:19].replace("T", " ") if value else None


def _machine(machine: Any) -> list[tuple[str, Any]]:
    if not isinstance(machine, Mapping):
        return [("machine", machine)]
    return [(str(key).replace("_", " "), value) for key, value in machine.items() if not isinstance(value, list | dict)]


def unfinished_notice(stages: Sequence[StageData]) -> Html | None:
    """Says where the run stands when not all of it is done."""
    left = [stage for stage in stages if stage.status != "done"]
    if not left:
        return None
    current = next((stage for stage in left if stage.status != "pending"), None)
    done = f"{len(stages) - len(left)} of {len(stages)} stages are done."
    where = ""
    if current is not None:
        at = f" at step {current.last_step}" if current.last_step else ""
        word = {"failed": f"failed{at}", "running": f"was running{at} when this page was made"}
        where = f" Stage {current.name} {word.get(current.status, f'stopped{at}')}."
    return tag("div", f"This run is not complete: {done}{where}", class_="card notice")


def tiles(run: RunData) -> Html:
    """The result in a few big numbers: the last trained model against what the chain began with."""
    first, last = first_and_last(run.stages)
    shown: list[Html] = []
    for key, name in (("pass@1", "pass@1"), ("language", "language consistency"), ("format", "well-formed")):
        value, start = score(last[1], key), score(first[1], key)
        if value is None:
            continue
        was = (
            f"{format_percent(start)}% in {short_name(first[0])}"
            if start is not None and first[0] != last[0]
            else "held-out"
        )
        shown.append(_tile(f"{name} of {last[0]}", format_percent(value), "%", was))
    done = sum(stage.status == "done" for stage in run.stages)
    if is_number(run.summary.get("seconds")):
        note = f"{done} of {len(run.stages)} stages done"
        shown.append(_tile("wall time", format_seconds(run.summary["seconds"]), "", note))
    return tag("div", *shown, class_="tiles") if shown else join()


def _tile(name: str, big: str, unit: str, note: str) -> Html:
    return tag(
        "div", tag("div", name), tag("div", big, tag("small", unit), class_="big"), tag("div", note), class_="tile"
    )


def first_and_last(stages: Sequence[StageData]) -> tuple[tuple[str, Mapping[str, Any]], tuple[str, Mapping[str, Any]]]:
    """(name, evaluation) of the model the chain began with and of the last one trained on it; students come after."""
    groups = evaluated(stages)
    empty: tuple[str, Mapping[str, Any]] = ("", {})
    trained = {stage.name for stage in stages if stage.kind != "distill"}
    own = [group for group in groups if group[0] in trained] or groups
    named = next((group for group in own if group[0] == "r1"), own[-1] if own else empty)
    return (groups[0] if groups else empty), named


def evaluated(stages: Sequence[StageData]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, evaluation) in the chain's order; a model from outside enters with the evaluation before its first use."""
    names = {stage.name for stage in stages}
    found: list[tuple[str, Mapping[str, Any]]] = []
    for stage in stages:
        outside = stage.model if stage.begun and stage.model and stage.model not in names else None
        if outside and score(stage.eval_before, "pass@1") is not None and outside not in dict(found):
            found.append((outside, stage.eval_before))
        if score(stage.eval_after, "pass@1") is not None:
            found.append((stage.name, stage.eval_after))
    return found


def chain_card(stages: Sequence[StageData]) -> Html:
    strokes = [("stroke", "takes this model"), ("stroke dashed", "takes these rows")]
    key = [tag("span", tag("i", class_=colour), name) for colour, name in strokes]
    bars = [tag("span", tag("i", class_=f"swatch {c}"), name) for c, name in (("c1", "pass@1"), ("c3", "language"))]
    drawing = tag("div", chain_graph(stages), class_="scroll")
    return tag(
        "section", tag("h2", "The chain"), tag("div", *bars, *key, class_="legend"), drawing, class_="card", id="chain"
    )


def score_card(stages: Sequence[StageData]) -> Html | None:
    """The headline: pass@1 and language consistency after each stage."""
    groups = evaluated(stages)
    if not groups:
        return None
    series = ["pass@1"] + (["language"] if any(score(e, "language") is not None for _, e in groups) else [])
    bars = [(name, {key: score(e, key) for key in series}, interval(e)) for name, e in groups]
    entries = [("c1", "pass@1, with its confidence interval"), ("c3", "language consistency")][: len(series)]
    return tag(
        "section",
        tag("h2", "Scores by stage"),
        tag("p", _how_measured(groups), class_="soft"),
        *(tag("p", f"{name}: {', '.join(found)}.", class_="soft") for name, e in groups if (found := losses(e))),
        legend(entries),
        tag("div", score_bars(bars, series), class_="scroll"),
        class_="card",
        id="scores",
    )


def _how_measured(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    evaluation = groups[-1][1]
    names = (("split", "split {}"), ("n", "{} prompts"), ("k", "{} samples each"), ("temperature", "temperature {}"))
    found = [form.format(evaluation[key]) for key, form in names if evaluation.get(key) is not None]
    return f"After each stage: {', '.join(found)}." if found else "After each stage."


def time_card(stages: Sequence[StageData]) -> Html | None:
    """Seconds by stage, stacked by phase."""
    rows = [(stage.name, stage_phases(stage)) for stage in stages]
    rows = [(name, phases) for name, phases in rows if phases]
    if not rows:
        return None
    present = {name for _, phases in rows for name in phases}
    names = [*(name for name in PHASE_CLASSES if name in present), *sorted(present - set(PHASE_CLASSES))]
    entries = [(phase_class(name, names), name) for name in names] if names != ["other"] else []
    return tag(
        "section",
        tag("h2", "Where the time went"),
        legend(entries),
        tag("div", time_rows(rows), class_="scroll"),
        class_="card",
        id="time",
    )


def stage_phases(stage: StageData) -> dict[str, float]:
    """Seconds by phase, what no phase accounts for as "other"."""
    rank = list(PHASE_CLASSES)
    phases = dict(sorted(stage.phases.items(), key=lambda item: rank.index(item[0]) if item[0] in rank else len(rank)))
    seconds = stage.seconds or 0.0
    rest = seconds - sum(phases.values())
    return phases | ({"other": phases.get("other", 0.0) + rest} if rest > 0.001 * seconds else {})
