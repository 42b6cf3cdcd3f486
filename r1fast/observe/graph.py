"""The chain as a graph: stages in columns by what they need, drawn as SVG.

column        0        1        2        3        4
rail       ┌─────────────────┬──────────────────┐          a source whose edges skip columns gets one rail
row 0    [base] → [zero] → [cold] → [dev1] → [dev2]        the longest path to the last model
row 1                                        [arm]         the rest, beside it
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from r1fast.observe.formats import format_number, format_percent, is_number, score, short_name
from r1fast.observe.markup import Html, anchor, clip, coordinate, svg, tag, text
from r1fast.observe.run_data import StageData

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _RAIL = 116, 78, 28, 24, 16
# Stages that make data, not a model: an edge out of one carries rows, and is drawn dashed.
_DATA_KINDS = ("collect", "reject")


@dataclass
class Node:
    """One stage, or a model that came from outside."""

    name: str
    stage: StageData | None
    parents: list[str] = field(default_factory=list)
    column: int = 0
    row: int = 0

    @property
    def x(self) -> float:
        return float(self.column * (_WIDTH + _GAP_X)) + 2

    @property
    def y(self) -> float:
        return float(self.row * (_HEIGHT + _GAP_Y))


def build_nodes(stages: Sequence[StageData]) -> dict[str, Node]:
    """Nodes with columns and rows; what a stage names but the run does not hold is a node without a stage."""
    nodes: dict[str, Node] = {}
    for stage in stages:
        parents = list(dict.fromkeys(name for name in (stage.model, *stage.inputs) if name and name != stage.name))
        for parent in parents:
            nodes.setdefault(parent, Node(parent, None))
        nodes[stage.name] = Node(stage.name, stage, parents)
    nodes |= {stage.name: nodes[stage.name] for stage in stages}
    for _ in nodes:  # longest path by relaxation: at most one round per node, and a cycle cannot hang it
        for node in nodes.values():
            node.column = min(len(nodes), max((nodes[name].column + 1 for name in node.parents), default=0))
    _pull_late_roots(nodes)
    _assign_rows(nodes)
    return nodes


def _children(nodes: Mapping[str, Node], name: str) -> list[Node]:
    return [node for node in nodes.values() if name in node.parents]


def _pull_late_roots(nodes: Mapping[str, Node]) -> None:
    """A root used late (a reward model, a student's base) stands right before its first use."""
    for node in nodes.values():
        children = _children(nodes, node.name)
        if not node.parents and children:
            node.column = min(child.column for child in children) - 1


def _assign_rows(nodes: Mapping[str, Node]) -> None:
    last = max(nodes.values(), key=lambda node: node.column)
    main = {last.name}
    while last.parents:
        last = max((nodes[name] for name in last.parents), key=lambda node: node.column)
        if last.name in main:
            break
        main.add(last.name)
    taken: dict[int, int] = {}
    for node in sorted(nodes.values(), key=lambda node: node.name not in main):
        node.row = taken.get(node.column, 0)
        taken[node.column] = node.row + 1


def chain_graph(stages: Sequence[StageData]) -> Html:
    """The drawing; a node links to its stage's section."""
    nodes = build_nodes(stages)
    data = {name for name, node in nodes.items() if node.stage and node.stage.kind in _DATA_KINDS}
    above, below = _rails(nodes)
    top = len(above) * _RAIL + 8.0
    floor = top + max(node.y for node in nodes.values()) + _HEIGHT
    width = max(node.x for node in nodes.values()) + _WIDTH + 2
    edges = []
    for node in nodes.values():
        for parent in (nodes[name] for name in node.parents):
            if node.column == parent.column + 1:
                path = _direct(parent, node, top)
            elif parent.name in above:
                path = _over(parent, node, top, top - 8 - _RAIL * above.index(parent.name))
            else:
                path = _under(parent, node, top, floor + 10 + _RAIL * below.index(parent.name))
            edges.append(tag("path", d=path, class_="edge data" if parent.name in data else "edge"))
    height = floor + (10 + _RAIL * len(below) if below else 4)
    boxes = [_box(node, top) for node in nodes.values()]
    arrow = tag("path", d="M0 0L7 3.5L0 7z", class_="arrow")
    marker = tag("marker", arrow, id="arrow", markerWidth=7, markerHeight=7, refX=6, refY=3.5, orient="auto")
    named = ", ".join(f"{name} from {' and '.join(node.parents) or 'scratch'}" for name, node in nodes.items())
    style = f"min-width:{coordinate(width * 0.7)}px;max-width:{coordinate(width * 1.15)}px"
    return svg(
        width, height, tag("defs", marker), *edges, *boxes, label=f"The chain: {named}", class_="chain", style=style
    )


def _rails(nodes: Mapping[str, Node]) -> tuple[list[str], list[str]]:
    """Sources of edges that skip a column: those of row 0 go over the rows, the others under; nearest rail first."""
    reach: dict[str, int] = {}
    for node in nodes.values():
        for name in node.parents:
            span = node.column - nodes[name].column
            if span != 1:
                reach[name] = max(reach.get(name, 0), span)
    ordered = sorted(reach, key=lambda name: reach[name])
    return [n for n in ordered if nodes[n].row == 0], [n for n in ordered if nodes[n].row > 0]


def _direct(parent: Node, node: Node, top: float) -> str:
    x1, y1 = parent.x + _WIDTH, parent.y + top + _HEIGHT / 2
    x2, y2 = node.x - 1, node.y + top + _HEIGHT / 2
    bend = (x2 - x1) / 2
    return f"M{x1:.0f} {y1:.0f}C{x1 + bend:.0f} {y1:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"


def _over(parent: Node, node: Node, top: float, rail: float) -> str:
    """Up from the source, along its rail, down into the target's top (row 0), or its side by way of the gutter."""
    x1 = parent.x + _WIDTH / 2 + 24
    start = f"M{x1:.0f} {top:.0f}V{rail + 6:.0f}q0 -6 6 -6"
    if node.row == 0:
        x2 = node.x + _WIDTH / 2 - 24
        return f"{start}H{x2 - 6:.0f}q6 0 6 6V{top - 1:.0f}"
    gutter, y2 = node.x - _GAP_X / 2, node.y + top + _HEIGHT / 2
    return f"{start}H{gutter - 6:.0f}q6 0 6 6V{y2 - 6:.0f}q0 6 6 6H{node.x - 1:.0f}"


def _under(parent: Node, node: Node, top: float, rail: float) -> str:
    """Out of the source's right side, down the gutter, along a rail below all rows, up into the target's side."""
    x1, y1 = parent.x + _WIDTH, parent.y + top + _HEIGHT / 2
    gutter_out, gutter_in = x1 + _GAP_X / 2, node.x - _GAP_X / 2
    y2 = node.y + top + _HEIGHT / 2
    return (
        f"M{x1:.0f} {y1:.0f}H{gutter_out - 6:.0f}q6 0 6 6V{rail - 6:.0f}q0 6 6 6"
        f"H{gutter_in - 6:.0f}q6 0 6 -6V{y2 + 6:.0f}q0 -6 6 -6H{node.x - 1:.0f}"
    )


def _box(node: Node, top: float) -> Html:
    x, y, stage = node.x, node.y + top, node.stage
    status = "outside" if stage is None else stage.status
    parts = [
        tag("title", _title(node)),
        tag("rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=8, class_=f"box {status}"),
        text(x + 10, y + 19, clip(short_name(node.name), 12), class_="node"),
        text(x + 10, y + 33, clip(stage.kind if stage else "given", 18), class_="kind"),
    ]
    parts += _scores(stage, x, y) if stage else []
    group = tag("g", *parts)
    return tag("a", group, href=f"#{anchor(node.name)}") if stage and stage.begun else group


def _title(node: Node) -> str:
    return (
        f"{node.name}: {node.stage.kind}, {node.stage.status}"
        if node.stage
        else f"{node.name}: given, not trained here"
    )


def _scores(stage: StageData, x: float, y: float) -> list[Html]:
    """pass@1 and language as two thin bars with numbers; for a stage of data, how many rows it kept."""
    parts: list[Html] = []
    rows = [("pass@1", "c1"), ("language", "c3")]
    for i, (key, colour) in enumerate(rows):
        value, y_row = score(stage.eval_after, key), y + 46 + i * 16
        if value is None:
            continue
        parts += [
            tag("rect", x=x + 10, y=y_row, width=50, height=6, rx=3, class_="track"),
            tag("rect", x=x + 10, y=y_row, width=50 * max(0.0, min(1.0, value)), height=6, rx=3, class_=colour),
            text(x + _WIDTH - 8, y_row + 7, f"{format_percent(value)}%", anchor="end", class_="score"),
        ]
    made = next((stage.numbers[key] for key in ("kept", "rows") if is_number(stage.numbers.get(key))), None)
    if not parts and made is not None:
        parts.append(text(x + 10, y + 56, f"{format_number(made)} rows", class_="score"))
    return parts
