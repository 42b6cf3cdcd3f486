"""Charts: ticks, thinning, smoothing, and that what is drawn stays inside its frame."""

import re
import xml.etree.ElementTree as ET

import pytest

from r1fast.observe.charts import count_rows, line_chart, load_map, nice_ticks, score_bars, smooth, thin, time_rows


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.07, 0.93, [0.0, 0.5, 1.0]),
        (-0.009, 0.008, [-0.01, 0.0, 0.01]),
        (5e-5, 5e-4, [0.0, 2.5e-4, 5e-4]),
    ],
)
def test_nice_ticks(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-9, 1e-30], ids=["zero", "positive", "tiny-negative", "minute"])
def test_ticks_of_a_constant_curve_surround_it(value: float) -> None:
    ticks = nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1] or (ticks[0] <= value <= ticks[-1] and ticks[0] < ticks[-1])


def test_thin_keeps_the_mean_and_short_curves() -> None:
    points = [(i, float(i)) for i in range(1000)]
    shown = thin(points, limit=100)
    assert len(shown) == 100 and shown[-1][0] == 999
    assert sum(y for _, y in shown) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:3]) == [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)]


def test_smooth_leaves_a_straight_line_straight() -> None:
    line = [0.5 * i for i in range(101)]
    assert smooth(line) == pytest.approx(line)


@pytest.mark.parametrize("count", [1, 2, 30, 1300], ids=["one", "two", "smoothed", "thinned"])
def test_curves_stay_inside_the_frame(count: int) -> None:
    points = [(10 * i, (-1.0) ** i * i) for i in range(count)]
    drawing = ET.fromstring(line_chart("kl", points))
    xs = [float(x) for x in drawing.get("data-xs", "").split()]
    ys = [float(y) for y in drawing.get("data-ys", "").split()]
    assert len(xs) == len(ys) == min(count, 160)
    assert all(0 <= x <= 280 for x in xs) and all(0 <= y <= 128 for y in ys)
    labels = [text.text for text in drawing.iter("text")]
    assert "0" in labels and (count == 1 or str(10 * (count - 1)) in labels or count == 1300)


def test_score_bars_draw_missing_scores_and_whiskers_as_given() -> None:
    groups = [("base", {"pass@1": 0.25, "language": None}, (0.2, 0.3)), ("r1", {"pass@1": 1.0, "language": 0.5}, None)]
    drawing = ET.fromstring(score_bars(groups, ["pass@1", "language"]))
    heights = [float(rect.get("height", "")) for rect in drawing.iter("rect")]
    assert heights == pytest.approx([62.0, 248.0, 124.0])
    assert len([path for path in drawing.iter("path") if path.get("class") == "whisker"]) == 1


def test_time_rows_share_one_scale() -> None:
    drawing = ET.fromstring(time_rows([("zero", {"generate": 30.0, "update": 10.0}), ("dev1", {"update": 10.0})]))
    widths = [float(rect.get("width", "")) for rect in drawing.iter("rect")]
    assert widths == pytest.approx([606.0, 202.0, 202.0])


def test_count_rows_label_counts_and_shares() -> None:
    drawing = count_rows([("kept", 1637, "c3"), ("mixed_language", 0, "c2")])
    assert re.findall(r">([\d,]+ · \d+%)<", drawing) == ["1,637 · 100%", "0 · 0%"]


def test_smooth_does_not_jump_to_an_outlier_at_the_end() -> None:
    assert abs(smooth([0.0] * 100 + [1.0])[-1]) < 0.7


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 1), (2, 8), (58, 256)])
def test_load_map_has_a_cell_per_expert_inside_its_frame(num_layers: int, num_experts: int) -> None:
    load = [[2.0 ** ((i + e) % 9 - 4) for e in range(num_experts)] for i in range(num_layers)]
    load[0][0] = 0.0  # nobody came
    drawing = ET.fromstring(load_map(load))
    _, _, width, height = (float(x) for x in drawing.get("viewBox", "").split())
    cells = [re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", path.get("d", "")) for path in drawing.iter("path")]
    assert sum(len(of_shade) for of_shade in cells) == num_layers * num_experts
    for x, y, w, h in (map(float, cell) for of_shade in cells for cell in of_shade):
        assert 0 < x < x + w < width and 0 < y < y + h < height


def test_load_map_shades_by_distance_from_even() -> None:
    drawing = ET.fromstring(load_map([[0.0, 0.5, 1.0, 1.1, 2.0, 9.0]]))
    shades = [(path.get("class"), path.get("fill-opacity")) for path in drawing.iter("path")]
    assert shades == [("c1", "1"), ("c1", "0.5"), ("even", None), ("c2", "0.5"), ("c2", "1")]
    assert [text.text for text in drawing.iter("text")] == ["0", "max 9.00"]
