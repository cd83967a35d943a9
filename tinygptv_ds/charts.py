"""Charts as SVG, drawn with the standard library alone: lines over steps, and stacked bars.

A chart is text to put into a page that has `STYLE` and `palette(...)` in its style sheet, or, through `standalone`, a
file of its own. Colors are CSS variables, so that one chart serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480.0, 270.0  # of the view box; 13 of its units are a letter's height
_INKS = ("ground", "ink", "faint", "grid", "band", *(f"c{number}" for number in range(8)))
_COLORS = {
    "light": "#ffffff #1f2328 #656d76 #e4e7eb #f3f5f7 #2563eb #d9480f #0f8a50 #9333ea #c2255c #0b7285 #9a6700 #57606a",
    "dark": "#0d1117 #e6edf3 #9198a1 #2a313a #161b22 #79a8ff #ff9a5c #56d391 #c9a0ff #ff86ad #5ad1de #e3bb52 #afb8c1",
}
THEMES = {theme: dict(zip(_INKS, colors.split(), strict=True)) for theme, colors in _COLORS.items()}
COLORS = 8
STYLE = """
svg.chart { display: block; width: 100%; height: auto; font: 13px system-ui, -apple-system, "Segoe UI", sans-serif }
.chart text { fill: var(--faint) } .chart .name { fill: var(--ink) }
.chart .grid { stroke: var(--grid) } .chart .band { fill: var(--band) }
.chart .limit { stroke: var(--faint); stroke-dasharray: 2 3 }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.chart .raw { stroke-width: 1.2; opacity: .35 }
.chart .hit { fill: transparent; stroke: none }
""" + "".join(f".chart .s{n} {{ stroke: var(--c{n}) }} .chart .f{n} {{ fill: var(--c{n}) }}\n" for n in range(COLORS))

_MOST_POINTS = 400  # of a line; more are drawn as the range and the mean of each of so many groups
_SMOOTHED_FROM = 30  # points
_LETTER = 7.2  # width of a letter, on average, generously
_LEGEND_ROW = 19.0
_BAND_NAME = 18.0  # height of the row of the bands' names

Point = tuple[float, float]


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


def palette(theme: str) -> str:
    """Return the colors of a theme, light or dark, as declarations of CSS variables."""
    return "; ".join(f"--{name}: {value}" for name, value in THEMES[theme].items())


def standalone(chart: str, theme: str) -> str:
    """Return a chart as an SVG file: its style and colors within it, on a ground of its own."""
    style = STYLE
    for name, value in THEMES[theme].items():
        style = style.replace(f"var(--{name})", value)
    ground = f'<rect width="100%" height="100%" fill="{THEMES[theme]["ground"]}"/>'
    head, body = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{ground}{body}\n'


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
        return _empty(size, "no values")
    names = [(line.name, line.color) for line in shown if line.name]
    legend, top = _legend(names, y_label, size[0], dashed=True)
    xs = [0.0, *(x for x, _ in values)] + [end for band in bands for end in (band.start, band.end)]
    frame = _Frame(
        (min(xs), max(xs)),
        _limits([y for _, y in values], log),
        log,
        size,
        (legend, top + (_BAND_NAME if bands else 0)),
    )
    body = [_draw_band(frame, band, number) for number, band in enumerate(bands)]
    body += [frame.axes(x_label), *(_draw_line(frame, line) for line in shown)]
    return frame.svg("".join(body), f"{y_label or 'values'} over {x_label}")


def bar_chart(
    bars: Sequence[tuple[str, Mapping[str, float]]],
    *,
    x_label: str,
    y_label: str,
    limits: Sequence[tuple[str, float]] = (),
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """Draw stacked bars.

    Args:
        bars: (label, values by part) of each bar; all have the same parts.
        x_label: below the axis.
        y_label: above the axis, with the unit.
        limits: named values, each a dashed line.
        size: width and height of the view box.
    """
    parts = list(bars[0][1])
    top = max([sum(values.values()) for _, values in bars] + [value for _, value in limits])
    legend = _legend([(part, number) for number, part in enumerate(parts)], y_label, size[0], dashed=False)
    frame = _Frame((-0.5, len(bars) - 0.5), (0.0, 1.05 * top), False, size, legend)
    body, width = [frame.grid()], 0.68 * (frame.x(1) - frame.x(0))
    for number, (label, values) in enumerate(bars):
        below = 0.0
        for part, (name, value) in enumerate(values.items()):
            y, height = frame.y(below + value), frame.y(below) - frame.y(below + value)
            body.append(
                f'<rect class="f{part % COLORS}" x="{frame.x(number) - width / 2:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}">{_tooltip(f"{label}: {name} {short(value)}")}</rect>'
            )
            below += value
        body.append(_text(frame.x(number), frame.bottom + 17, label, "middle"))
    for name, value in limits:
        y = frame.y(value)
        body.append(f'<path class="limit" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        body.append(_text(frame.right, y - 4, name, "end"))
    body.append(_text(frame.right, frame.bottom + 34, x_label, "end"))
    return frame.svg("".join(body), f"{y_label} by {x_label}")


def short(value: float) -> str:
    """Return a number in few letters: 12k, 0.325, 2e-04."""
    size = abs(value)
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= 10 * factor or (size >= factor and unit != "k"):
            return f"{value / factor:.3g}{unit}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average over a 25th of the values, without pull towards the first one."""
    keep, mean, weight, found = 1 - min(1.0, 25 / max(len(values), 1)), 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight if weight and not math.isnan(value) else math.nan)
    return found


class _Frame:
    """The place of values on the view box, with axes."""

    def __init__(self, xs: Point, ys: Point, log: bool, size: tuple[float, float], legend: tuple[str, float]) -> None:
        self._xs, self._ys, self._log, self._size = xs, ys, log, size
        self._legend, self.top = legend
        self.bottom, self.right = size[1] - 40, size[0] - 12
        self.y_ticks = _named(_log_ticks(*ys) if log else _ticks(*ys, most=5), even=not log)
        self.left = 12 + _LETTER * max(len(name) for _, name in self.y_ticks)

    def x(self, value: float) -> float:
        low, high = self._xs
        return self.left + (self.right - self.left) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high, at = *self._ys, value
        if self._log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.bottom - (self.bottom - self.top) * (at - low) / (high - low)

    def grid(self) -> str:
        rows = [(self.y(value), name) for value, name in self.y_ticks]
        lines = "".join(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>' for y, _ in rows)
        return lines + "".join(_text(self.left - 7, y + 4, name, "end") for y, name in rows)

    def axes(self, x_label: str) -> str:
        low, high = self._xs
        ticks = [value for value in _ticks(low, high, most=6) if low <= value <= high] if high > low else [low]
        named = _named(ticks, even=True)
        names = "".join(_text(self.x(value), self.bottom + 17, name, "middle") for value, name in named)
        return self.grid() + names + _text(self.right, self.bottom + 34, x_label, "end")

    def svg(self, body: str, label: str) -> str:
        return (
            f'<svg class="chart" viewBox="0 0 {self._size[0]:g} {self._size[1]:g}" role="img" '
            f'aria-label="{escape(label)}">{self._legend}{body}</svg>'
        )


def _draw_line(frame: _Frame, line: Line) -> str:
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
            hint = _tooltip(f"{line.name + ', ' if line.name else ''}{x:,.0f}: {short(y)}")
            drawn += f'<circle class="hit" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="7">{hint}</circle>'
    return drawn


def _draw_band(frame: _Frame, band: Band, number: int) -> str:
    left, right, top = frame.x(band.start), frame.x(band.end), frame.top - _BAND_NAME - 2
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.bottom - top:.1f}"'
    shade = f'<rect class="band" {place}/>' if number % 2 == 0 else ""
    room = int((right - left) / _LETTER)
    name = band.name if len(band.name) <= room else f"{band.name[: room - 1]}…" if room > 3 else ""
    return shade + _text((left + right) / 2, top + 14, name, "middle")


def _paths(frame: _Frame, points: Sequence[Point]) -> list[str]:
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


def _limits(values: Sequence[float], log: bool) -> Point:
    """Return the ends of the y axis: with 0 where that is near, and room around the values."""
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low <= 0.5 * high else low - room), high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _named(ticks: Sequence[float], *, even: bool) -> list[tuple[float, str]]:
    """Return ticks with their names; those of even distances have as many decimals as they need to differ."""
    step = abs(ticks[1] - ticks[0]) if even and len(ticks) > 1 else 0.0
    if step < 1e-4 or max(map(abs, ticks)) >= 10_000:
        return [(value, short(value)) for value in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value:.{decimals}f}") for value in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, or the powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low <= value <= high] or [low, high]


def _legend(names: Sequence[tuple[str, int]], y_label: str, width: float, *, dashed: bool) -> tuple[str, float]:
    """Return the y axis's label and the legend, in rows, and how far down they reach."""
    row, x, drawn = (_LEGEND_ROW if y_label else 0.0), 12.0, _text(12, 15, y_label, "start", "name") if y_label else ""
    for name, color in names if len(names) > 1 or dashed is False else ():
        text = name if len(name) <= 40 else f"…{name[-39:]}"
        taken = 26 + _LETTER * len(text)
        if x > 12 and x + taken > width:
            x, row = 12.0, row + _LEGEND_ROW
        dash = ' stroke-dasharray="4 3"' if dashed and color >= COLORS else ""
        drawn += f'<path class="s{color % COLORS}"{dash} stroke-width="4" d="M{x:.1f} {row + 10:.1f}h14"/>'
        drawn += _text(x + 19, row + 15, text, "start", "name")
        x += taken + 6
    return drawn, row + (_LEGEND_ROW if x > 12 else 0) + 12


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _tooltip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _empty(size: tuple[float, float], reason: str) -> str:
    middle = _text(size[0] / 2, size[1] / 2, reason, "middle")
    return f'<svg class="chart" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{reason}">{middle}</svg>'
