"""The page's charts as inline SVG: curves, whiskers, stacked bars. Colours are the style sheet's classes."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from r1fast.observe.formats import format_number, format_percent, format_seconds, short_name
from r1fast.observe.markup import Html, anchor, clip, coordinate, join, svg, tag, text

# The colour of each phase of a step, in the order of a step; other names get what is left.
PHASE_CLASSES = {
    "generate": "c1",
    "reward": "c2",
    "logprobs": "c3",
    "log-probs": "c3",
    "update": "c4",
    "eval": "c5",
    "evaluate": "c5",
    "save": "c6",
    "other": "c0",
}
_MAX_POINTS = 160


def nice_ticks(low: float, high: float, count: int = 3) -> list[float]:
    """About `count` round numbers that span low..high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thin(points: Sequence[tuple[int, float]], limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its share."""
    if len(points) <= limit:
        return [(float(x), y) for x, y in points]
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    shares = [points[a:b] for a, b in pairwise(edges)]
    return [(float(share[-1][0]), sum(y for _, y in share) / len(share)) for share in shares]


def smooth(values: Sequence[float]) -> list[float]:
    """Local straight-line fit over a twelfth of the curve: no lag, and no jump to the last raw value at the ends."""
    half = max(2, len(values) // 24)
    out = []
    for i in range(len(values)):
        first = max(0, i - half)
        window = values[first : i + half + 1]
        centre, mean = first + (len(window) - 1) / 2, sum(window) / len(window)
        spread = sum((first + j - centre) ** 2 for j in range(len(window)))
        slope = sum((first + j - centre) * value for j, value in enumerate(window)) / spread if spread else 0.0
        out.append(mean + slope * (i - centre))
    return out


def line_chart(name: str, points: Sequence[tuple[int, float]]) -> Html:
    """One metric over the steps: the raw values faint, their moving average strong. Hovering reads the values."""
    width, height, left, right, top, bottom = 280, 128, 44, 8, 8, 20
    shown = thin(points)
    ticks = nice_ticks(min(y for _, y in shown), max(y for _, y in shown))
    x_low, x_high = shown[0][0], shown[-1][0]
    x_scale = (width - left - right) / ((x_high - x_low) or 1.0)
    y_scale = (height - top - bottom) / (ticks[-1] - ticks[0])

    def place(x: float, y: float) -> tuple[float, float]:
        middle = (width - left - right) / 2 if x_high == x_low else (x - x_low) * x_scale
        return left + middle, height - bottom - (y - ticks[0]) * y_scale

    grid = [_y_tick(tick, place(x_low, tick)[1], left, width - right) for tick in ticks]
    ends = [text(left, height - 6, format_number(points[0][0]), class_="tick")]
    if x_high > x_low:
        ends.append(text(width - right, height - 6, format_number(points[-1][0]), anchor="end", class_="tick"))
    many = len(shown) > 24
    raw = [place(x, y) for x, y in shown]
    strong = [place(x, y) for (x, _), y in zip(shown, smooth([y for _, y in shown]))] if many else raw
    lines = [_path(raw, "raw")] if many else []
    lines.append(_path(strong, "curve") if len(strong) > 1 else _dot(*strong[0]))
    return svg(
        width,
        height,
        *grid,
        *ends,
        *lines,
        label=f"{name} by step, last value {format_number(points[-1][1])}",
        class_="line",
        data_steps=" ".join(str(int(x)) for x, _ in shown),
        data_values=" ".join(format_number(y) for _, y in shown),
        data_xs=" ".join(coordinate(x) for x, _ in raw),
        data_ys=" ".join(coordinate(y) for _, y in raw),
    )


def _y_tick(value: float, y: float, left: float, right: float) -> Html:
    line = tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
    return join(line, text(left - 6, y + 3.5, format_number(value), anchor="end", class_="tick"))


def _path(points: Sequence[tuple[float, float]], class_: str) -> Html:
    moves = "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)
    return tag("path", d=f"M{moves}", class_=class_)


def _dot(x: float, y: float) -> Html:
    return tag("circle", cx=x, cy=y, r=3, class_="dot")


def score_bars(
    groups: Sequence[tuple[str, Mapping[str, float | None], tuple[float, float] | None]], series: Sequence[str]
) -> Html:
    """Scores (shares of one) by stage, one bar per series; the first series carries confidence whiskers."""
    left, top, bottom, height = 44, 22, 30, 300
    group_width = max(64.0, min(120.0, 1036 / max(1, len(groups))))
    width = left + group_width * len(groups) + 4
    bar = min(30.0, (group_width - 18) / max(1, len(series)))
    y_scale = height - top - bottom

    def y_of(value: float) -> float:
        return height - bottom - max(0.0, min(1.0, value)) * y_scale

    parts = [_y_percent(share, y_of(share), left, width) for share in (0, 0.25, 0.5, 0.75, 1)]
    for i, (name, values, bounds) in enumerate(groups):
        middle = left + group_width * (i + 0.5)
        present = [key for key in series if values.get(key) is not None]
        for j, key in enumerate(present):
            x = middle + (j - len(present) / 2) * (bar + 3) + 1.5
            whisker = bounds if key == series[0] else None
            fill = f"c{series.index(key) * 2 + 1}"
            parts.append(_score_bar(x, bar, float(values[key] or 0.0), y_of, whisker, f"{name}: {key}", fill))
        label = clip(short_name(name), int(group_width / 7.6))
        parts.append(text(middle, height - 10, label, anchor="middle", class_="name"))
    described = "; ".join(f"{name} {format_percent(values.get(series[0]))}" for name, values, _ in groups)
    style = f"max-width:{coordinate(width)}px;min-width:{coordinate(min(width, 640.0))}px"
    return svg(width, height, *parts, label=f"{series[0]} by stage in percent: {described}", style=style)


def _y_percent(share: float, y: float, left: float, right: float) -> Html:
    line = tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid" if share else "axis")
    return join(line, text(left - 8, y + 4, f"{share:.0%}", anchor="end", class_="tick"))


def _score_bar(
    x: float,
    width: float,
    value: float,
    y_of: Callable[[float], float],
    whisker: tuple[float, float] | None,
    name: str,
    fill: str,
) -> Html:
    y, base = y_of(value), y_of(0.0)
    written = format_percent(value, 1 if width >= 28 else 0)
    hint = tag("title", f"{name} {format_percent(value)}%")
    bar = tag("rect", hint, x=x, y=y, width=width, height=base - y, rx=2.5, class_=fill)
    if whisker is None:
        return join(bar, text(x + width / 2, y - 6, written, anchor="middle", class_="value"))
    low, high, middle = y_of(whisker[0]), y_of(whisker[1]), x + width / 2
    strokes = f"M{coordinate(middle)} {coordinate(low)}V{coordinate(high)}"
    for end in (low, high):
        strokes += f"M{coordinate(middle - 4)} {coordinate(end)}h8"
    label = text(middle, min(y, high) - 6, written, anchor="middle", class_="value")
    return join(bar, tag("path", d=strokes, class_="whisker"), label)


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """Colour class and name of each series."""
    items = [tag("span", tag("i", class_=f"swatch {colour}"), name) for colour, name in entries]
    return tag("div", *items, class_="legend")


def phase_class(name: str, names: Sequence[str]) -> str:
    """The colour of a phase: its own, else one of the spare ones by position."""
    if name in PHASE_CLASSES:
        return PHASE_CLASSES[name]
    spare = [other for other in names if other not in PHASE_CLASSES]
    return f"c{7 + spare.index(name) % 3}"


def time_rows(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Html:
    """Stacked bars of seconds, one row each (stage, phase -> seconds), on one scale, each with its total."""
    names = list(dict.fromkeys(name for _, phases in rows for name in phases))
    longest = max((sum(phases.values()) for _, phases in rows), default=0.0) or 1.0
    left, width, height = 136.0, 1036.0, 26.0
    parts: list[Html] = []
    for i, (name, phases) in enumerate(rows):
        y, total = i * height + 4, sum(phases.values())
        length = total / longest * (width - left - 92)
        label = text(left - 12, y + 13.5, clip(name, 16), anchor="end", class_="name")
        parts += [tag("a", label, href=f"#{anchor(name)}"), _stack(phases, names, left, y, length, 18)]
        parts.append(text(left + length + 8, y + 13.5, format_seconds(total), class_="value"))
    described = "; ".join(f"{name} {format_seconds(sum(phases.values()))}" for name, phases in rows)
    return svg(width, height * len(rows) + 4, *parts, label=f"seconds by phase: {described}", class_="wide")


def phase_bar(phases: Mapping[str, float]) -> Html:
    """One stage's seconds by phase, as one bar."""
    described = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in phases.items())
    return svg(480, 14, _stack(phases, list(phases), 0, 0, 480, 14), label=f"seconds by phase: {described}")


def _stack(phases: Mapping[str, float], names: Sequence[str], x: float, y: float, length: float, height: float) -> Html:
    total = sum(phases.values()) or 1.0
    parts = []
    for phase, seconds in phases.items():
        hint = tag("title", f"{phase}: {format_seconds(seconds)} ({seconds / total:.0%})")
        share = max(0.5, seconds / total * length)
        parts.append(tag("rect", hint, x=x, y=y, width=share, height=height, class_=phase_class(phase, names)))
        x += seconds / total * length
    return join(*parts)


def count_rows(rows: Sequence[tuple[str, int, str]]) -> Html:
    """Horizontal bars of counts (name, count, colour class), each with its count and share of all."""
    total = sum(count for _, count, _ in rows) or 1
    longest = max((count for _, count, _ in rows), default=1) or 1
    left, right, width, height = 150.0, 110.0, 640.0, 26.0
    parts = []
    for i, (name, count, colour) in enumerate(rows):
        y, length = i * height + 4, count / longest * (width - left - right)
        parts += [
            text(left - 12, y + 13.5, clip(name.replace("_", " "), 20), anchor="end", class_="name"),
            tag("rect", x=left, y=y, width=max(length, 0.5), height=18, rx=2.5, class_=colour),
            text(left + length + 8, y + 13.5, f"{count:,} · {count / total:.0%}", class_="value"),
        ]
    described = "; ".join(f"{name} {count}" for name, count, _ in rows)
    return svg(width, height * len(rows) + 4, *parts, label=described, class_="counts")


def load_map(load_LE: Sequence[Sequence[float]]) -> Html:
    """Load of every expert (columns) in every layer (rows), 1 = its even share: blue below, orange above.

    Colours are steps of a factor of 1.41, full at 4 or at a quarter; each row ends with its largest load.
    """
    left, right, top = 30.0, 64.0, 4.0
    width = 480.0
    cell = (width - left - right) / max(len(row) for row in load_LE)
    height = max(5.0, min(18.0, cell))
    shades: dict[int, str] = {}
    labels: list[Html] = []
    for i, row in enumerate(load_LE):
        y = top + i * height
        for e, load in enumerate(row):
            shade = max(-4, min(4, round(2 * math.log2(load)))) if load > 0 else -4
            box = f"h{coordinate(cell * 0.94)}v{coordinate(height * 0.9)}h{coordinate(-cell * 0.94)}z"
            shades[shade] = shades.get(shade, "") + f"M{coordinate(left + e * cell)} {coordinate(y)}{box}"
        if height >= 10 or i % math.ceil(10 / height) == 0:
            middle = y + height / 2 + 3.5
            labels.append(text(left - 8, middle, str(i), anchor="end", class_="tick"))
            labels.append(text(width - right + 8, middle, f"max {max(row):.2f}", class_="tick"))
    cells = [
        tag("path", d=path, class_="even" if shade == 0 else "c1" if shade < 0 else "c2", fill_opacity=_opacity(shade))
        for shade, path in sorted(shades.items())
    ]
    described = "; ".join(f"layer {i} from {min(row):.2f} to {max(row):.2f}" for i, row in enumerate(load_LE))
    return svg(width, top + height * len(load_LE) + 4, *cells, *labels, label=f"load of experts: {described}")


def _opacity(shade: int) -> float | None:
    return abs(shade) / 4 if shade else None
