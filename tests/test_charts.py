"""Charts as SVG: well-formed, with every value at its place, whatever the values are."""

import math
import re
from xml.etree import ElementTree

import pytest

from tinygptv_ds.charts.axes import short
from tinygptv_ds.charts.bars import bar_chart
from tinygptv_ds.charts.lines import Band, Line, line_chart, smoothed
from tinygptv_ds.charts.style import THEMES, stacked, standalone

CASES = {
    "nothing": [],
    "one point": [(3, 0.5)],
    "equal values": [(0, 2.0), (10, 2.0)],
    "zeros": [(0, 0.0), (10, 0.0)],
    "gaps": [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)],
    "nothing finite": [(0, math.nan), (1, math.inf)],
    "negative": [(0, -3.0), (5, -1.0)],
    "tiny": [(0, 1e-12), (5, 3e-12)],
    "huge": [(0, 1e300), (10**9, 3e300)],
    "neighbors": [(0, 1.0), (1, math.nextafter(1.0, 2.0))],
    "many": [(step, 1 / (step + 1)) for step in range(100_000)],
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", CASES.values(), ids=CASES)
def test_it_is_an_svg(points: list[tuple[float, float]], log: bool) -> None:
    chart = line_chart([Line("<a & b>", points), Line("other", [])], y_label="<loss>", log=log)
    for theme in (*THEMES, None):
        ElementTree.fromstring(standalone(chart, theme))
    assert "nan" not in chart and "inf" not in chart and len(chart) < 60_000


def test_charts_below_each_other() -> None:
    """In one file, each in its place, and in both themes."""
    chart = standalone(stacked([line_chart([Line("", [(0, 1.0)])])] * 2, (480, 270)))
    inner = ElementTree.fromstring(chart).findall("{*}svg")
    assert [part.get("y") for part in inner] == ["0", "270"]
    assert "prefers-color-scheme: dark" in chart and "fill: var(--ground)" in chart


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline[^>]* points="([^"]*)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in found]


def test_values_are_at_their_places() -> None:
    (line,) = polylines(line_chart([Line("", [(0, 1.0), (50, 2.0), (100, 4.0)])]))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and (y0 - y1) * 2 == pytest.approx(y1 - y2, abs=0.3)
    (line,) = polylines(line_chart([Line("", [(0, 1.0), (50, 2.0), (100, 4.0)])], log=True))
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)


def test_gaps_interrupt_a_line() -> None:
    lines = polylines(line_chart([Line("", [(0, 1.0), (1, 1.0), (2, math.nan), (3, 1.0), (4, 1.0)])]))
    assert [len(line) for line in lines] == [2, 2]


def test_a_spike_survives_among_many_points() -> None:
    """Only the least and the greatest of each group of neighbors are drawn."""
    points = [(step, 9.0 if step == 7777 else 1.0) for step in range(50_000)]
    raw, means = polylines(line_chart([Line("", points)]))
    top = min(y for _, y in raw)
    assert top < min(y for _, y in means) and sum(y == top for _, y in raw) == 1 and len(raw) <= 800


def test_smoothing() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)  # no pull towards 0 at the start
    rising = smoothed([float(n) for n in range(100)])
    assert rising[0] == 0 and rising == sorted(rising) and 90 < rising[-1] < 99
    assert [math.isnan(value) for value in smoothed([1.0, math.nan, 1.0])] == [False, True, False]


def test_bands_and_legend() -> None:
    lines = [Line("a", [(0, 1.0)], 0), Line("b", [(300, 2.0)], 9)]
    chart = line_chart(lines, bands=[Band(0, 100, "stage 1"), Band(100, 101, "no room"), Band(101, 400, "stage 3")])
    assert "stage 1" in chart and "stage 3" in chart and "no room" not in chart
    assert ">a<" in chart and "stroke-dasharray" in chart  # the ninth color is the first one again, dashed


def test_bars_are_stacked() -> None:
    bars = [("1", {"weights": 1.0, "logits": 1.0}), ("2", {"weights": 1.0, "logits": 3.0})]
    chart = bar_chart(bars, x_label="samples", y_label="GiB", limits=[("card", 4.5)])
    ElementTree.fromstring(chart)
    found = re.findall(r'<rect class="f(\d)" x="([^"]*)" y="([^"]*)" width="[^"]*" height="([^"]*)"', chart)
    (_, _, y0, h0), (_, _, y1, h1), _, (_, _, _, h3) = found
    assert float(y1) + float(h1) == pytest.approx(float(y0), abs=0.2) and float(h3) == pytest.approx(
        3 * float(h0), abs=0.3
    )
    assert ">card<" in chart


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234, "1234"), (12_000, "12k"), (3.25e6, "3.25M"), (2e-4, "2e-4"), (-0.25, "-0.25")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
