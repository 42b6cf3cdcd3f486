"""What is drawn on a page: dots with their intervals on an axis that fits them, the chain's rails, thinned curves."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from r1fast.observe.formats import format_bytes, format_number, format_percent
from r1fast.observe.run_files import StageData
from r1fast.observe.scores import Score

LANE = 12  # pixels between two rails of the chain
SHORTEST_AXIS, CHARACTER = 66, 6.3  # pixels, of an axis and of a character at it
MOST_POINTS = 100_000  # of all curves of a page
FEWEST_POINTS, MOST_POINTS_OF_ONE = 60, 600


@dataclass
class Mark:
    """A dot and its interval, in percent of the axis."""

    colour: str
    at: float
    low: float
    high: float
    title: str


@dataclass
class DotRow:
    name: str
    text: str  # the value
    note: str = ""  # behind it, fainter
    marks: list[Mark] = field(default_factory=list)


@dataclass
class DotChart:
    title: str
    unit: str
    ticks: list[tuple[float, str]]  # (percent of the axis, label)
    rows: list[DotRow]


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers, the first at most low and the last at least high."""
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-290):
        pad = abs(low) / 10 if abs(low) > 1e-290 else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 3
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def score_chart(title: str, rows: Sequence[tuple[str, str, Score]], is_share: bool) -> DotChart:
    """rows: (name, colour, score); the axis holds every interval, and no more of what is not there than it must."""
    write = format_percent if is_share else format_number
    found = ticks(min(score.bounds[0] for *_, score in rows), max(score.bounds[1] for *_, score in rows))
    found = [tick for tick in found if 0 <= tick <= 1] if is_share else found  # around one value there was room added
    place = _scale(found)
    drawn = []
    for name, colour, score in rows:
        low, high = map(place, score.bounds)
        mark = Mark(colour, place(score.value), low, high, f"{name}: {score.text(is_share)}")
        note = f"± {write(score.half)}" if score.half is not None else ""
        drawn.append(DotRow(name, write(score.value), note, [mark]))
    labels = [f"{100 * tick:g}" if is_share else format_number(tick) for tick in found]
    return DotChart(title, "%" if is_share else "", _labelled(found, labels), drawn)


def memory_chart(stages: Iterable[StageData], colours: Mapping[str, str]) -> DotChart | None:
    """The most memory of each phase, a row per stage; None where none is known."""
    known = [stage for stage in stages if stage.memory]
    if not known:
        return None
    found = ticks(0.0, max(max(stage.memory.values()) for stage in known))
    place, rows = _scale(found), []
    for stage in known:
        marks = [
            Mark(colours[name], at := place(peak), at, at, f"{stage.name}, {name}: {format_bytes(peak)}")
            for name, peak in stage.memory.items()
        ]
        rows.append(DotRow(stage.name, format_bytes(max(stage.memory.values())), marks=marks))
    return DotChart("Most memory by phase", "", _labelled(found, list(map(format_bytes, found))), rows)


def _labelled(found: Sequence[float], labels: Sequence[str]) -> list[tuple[float, str]]:
    """Ticks with labels that do not meet where an axis is shortest: of all, of every second, .. or of the ends."""
    gaps, place = len(found) - 1, _scale(found)
    for every in (n for n in range(1, gaps + 1) if gaps % n == 0):
        kept = labels[::every]
        if max(len(a) + len(b) for a, b in pairwise(kept)) / 2 * CHARACTER + 3 <= SHORTEST_AXIS * every / gaps:
            break
    return [(place(tick), "" if i % every else label) for i, (tick, label) in enumerate(zip(found, labels))]


def _scale(found: Sequence[float]) -> Callable[[float], float]:
    return lambda value: round(100 * (value - found[0]) / (found[-1] - found[0]), 3)


@dataclass
class Segment:
    """A piece of a rail in one row of the chain, by CSS class, `left` and `width` in pixels; dashed where rows go."""

    shape: str
    left: int
    width: int = 0
    is_rows: bool = False


@dataclass
class Chain:
    """Rows under each other, each with its dot at `x` pixels and its pieces of the rails on the left of it."""

    x: int
    rows: list[list[Segment]]


def chain(stages: Sequence[StageData]) -> Chain:
    """Who takes what of whom. A neighbour is joined straight; others by a rail that all users of a source share.

    row 0   ┌─● base
    row 1   │ ● zero        rails of sources that are needed at the same time lie beside each other
    row 2   └─● dev1
    """
    index = {stage.name: i for i, stage in enumerate(stages)}
    rows: list[list[Segment]] = [[] for _ in stages]
    users: dict[int, list[int]] = {}
    straight: list[tuple[int, int]] = []
    for i, stage in enumerate(stages):
        for j in (index[name] for name in stage.sources if index.get(name, i) < i):
            if j == i - 1:
                straight.append((j, i))
            else:
                users.setdefault(j, []).append(i)
    ends: list[int] = []  # of the last rail in each lane
    lanes: dict[int, int] = {}
    for j in sorted(users):
        lane = next((lane for lane, end in enumerate(ends) if end <= j), len(ends))
        ends[lane : lane + 1] = [users[j][-1]]
        lanes[j] = lane
    x = LANE * len(ends) + 7
    for j, i in straight:
        is_rows = stages[j].kind in ("collect", "reject")
        rows[j].append(Segment("down", x, is_rows=is_rows))
        rows[i].append(Segment("up", x, is_rows=is_rows))
    for j, taken in users.items():
        left, is_rows = x - LANE * (lanes[j] + 1), stages[j].kind in ("collect", "reject")
        rows[j].append(Segment("out", left, x - left, is_rows))
        for i in range(j + 1, taken[-1]):
            rows[i].append(Segment("via", left, 0, is_rows))
            if i in taken:
                rows[i].append(Segment("tee", left, x - left, is_rows))
        rows[taken[-1]].append(Segment("in", left, x - left, is_rows))
    return Chain(x, rows)


def thinned(points: Sequence[tuple[int, float]], num_curves: int) -> list[tuple[float, float]]:
    """A curve with as many points as there is room for; each is the mean of its share."""
    most = min(MOST_POINTS_OF_ONE, max(FEWEST_POINTS, MOST_POINTS // max(1, num_curves)), len(points))
    shares = np.array_split(np.array(points, dtype=float), most)
    ends = [points[0][0], *(share[-1, 0] for share in shares[1:])]
    return [(float(end), float(f"{share[:, 1].mean():.6g}")) for end, share in zip(ends, shares)]
