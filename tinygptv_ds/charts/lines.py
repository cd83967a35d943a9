"""Lines over steps as SVG, to put into a page whose style sheet has `STYLE` and `palette(...)` of `charts/style.py`.

Colors are CSS variables, so that one chart serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinygptv_ds.charts.axes import LETTER, Frame, Point, empty, legend_of, limits_of, short, text_at, tooltip
from tinygptv_ds.charts.style import COLORS, HEIGHT, WIDTH

_MOST_POINTS = 400  # of a line; more are drawn as the range and the mean of each of so many groups
_SMOOTHED_FROM = 30  # points
_BAND_NAME = 18.0  # height of the row of the bands' names


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend; empty: not there.
        points: (x, y) by ascending x; a y that is not finite interrupts the line.
        color: number of its color; they repeat after `COLORS`, dashed.
    """

    name: str
    points: Sequence[Point]
    color: int = 0


@dataclass(frozen=True)
class Band:
    """A part of the x axis with a name, e.g. a stage."""

    start: float
    end: float
    name: str


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    y_label: str = "",
    log: bool = False,
    bands: Sequence[Band] = (),
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """Draw lines; one of many points is smoothed, with its own values pale behind it.

    Args:
        lines: what to draw.
        x_label: below the axis.
        y_label: above the axis, with the unit.
        log: logarithmic y axis; values of 0 and less are left out.
        bands: parts of the x axis, every other one shaded.
        size: width and height of the view box.
    """
    shown = [Line(line.name, _reduced(_usable(line.points, log)), line.color) for line in lines]
    values = [point for line in shown for point in line.points if not math.isnan(point[1])]
    if not values:
        return empty(size, "no values")
    names = [(line.name, line.color) for line in shown if line.name]
    legend, top = legend_of(names, y_label, size[0], dashed=True)
    xs = [0.0, *(x for x, _ in values)] + [end for band in bands for end in (band.start, band.end)]
    frame = Frame(
        (min(xs), max(xs)),
        limits_of([y for _, y in values], log),
        log,
        size,
        (legend, top + (_BAND_NAME if bands else 0)),
    )
    body = [_draw_band(frame, band, number) for number, band in enumerate(bands)]
    body += [frame.axes(x_label), *(_draw_line(frame, line) for line in shown)]
    return frame.svg("".join(body), f"{y_label or 'values'} over {x_label}")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average over a 25th of the values, without pull towards the first one."""
    keep, mean, weight, found = 1 - min(1.0, 25 / max(len(values), 1)), 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight if weight and not math.isnan(value) else math.nan)
    return found


def _draw_line(frame: Frame, line: Line) -> str:
    color, dash = f"s{line.color % COLORS}", ' stroke-dasharray="6 4"' if line.color >= COLORS else ""
    many = len(line.points) >= _SMOOTHED_FROM
    drawn = "".join(
        f'<polyline class="{color}{" raw" if many else ""}"{dash} points="{part}"/>'
        for part in _paths(frame, line.points)
    )
    if many:
        means = list(zip((x for x, _ in line.points), smoothed([y for _, y in line.points]), strict=True))
        drawn += "".join(f'<polyline class="{color}"{dash} points="{part}"/>' for part in _paths(frame, means))
    finite = [(x, y) for x, y in line.points if not math.isnan(y)]
    every = max(1, len(finite) // 60)
    for number, (x, y) in enumerate(finite):
        if len(finite) <= 3:
            drawn += f'<circle class="f{line.color % COLORS}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>'
        if number % every == 0 or number == len(finite) - 1:
            hint = tooltip(f"{line.name + ', ' if line.name else ''}{x:,.0f}: {short(y)}")
            drawn += f'<circle class="hit" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="7">{hint}</circle>'
    return drawn


def _draw_band(frame: Frame, band: Band, number: int) -> str:
    left, right, top = frame.x(band.start), frame.x(band.end), frame.top - _BAND_NAME - 2
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.bottom - top:.1f}"'
    shade = f'<rect class="band" {place}/>' if number % 2 == 0 else ""
    room = int((right - left) / LETTER)
    name = band.name if len(band.name) <= room else f"{band.name[: room - 1]}…" if room > 3 else ""
    return shade + text_at((left + right) / 2, top + 14, name, "middle")


def _paths(frame: Frame, points: Sequence[Point]) -> list[str]:
    """Return the points of each uninterrupted part of a line."""
    parts: list[list[str]] = [[]]
    for x, y in points:
        if math.isnan(y):
            parts.append([])
        else:
            parts[-1].append(f"{frame.x(x):.1f},{frame.y(y):.1f}")
    return [" ".join(part) for part in parts if part]


def _usable(points: Sequence[Point], log: bool) -> list[Point]:
    """Return the points with NaN for every y that the axis does not have."""
    return [(x, y if math.isfinite(y) and (y > 0 or not log) else math.nan) for x, y in points]


def _reduced(points: list[Point]) -> list[Point]:
    """Return at most twice `_MOST_POINTS` points: of each group of neighbors the least and the greatest, in order."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 2:
        return points
    found: list[Point] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        finite = [point for point in group if not math.isnan(point[1])]
        ends = (
            {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else group[:1]
        )
        found += sorted(ends)
    return found
