"""The axes of a chart: the place of values on the view box, ticks, numbers and the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from tinygptv_ds.charts.style import COLORS

Point = tuple[float, float]

LETTER = 7.2  # width of a letter, on average, generously
_LEGEND_ROW = 19.0


class Frame:
    """The place of values on the view box, with axes."""

    def __init__(self, xs: Point, ys: Point, log: bool, size: tuple[float, float], legend: tuple[str, float]) -> None:
        self._xs, self._ys, self._log, self._size = xs, ys, log, size
        self._legend, self.top = legend
        self.bottom, self.right = size[1] - 40, size[0] - 12
        self.y_ticks = _named(_log_ticks(*ys) if log else _ticks(*ys, most=5), even=not log)
        self.left = 12 + LETTER * max(len(name) for _, name in self.y_ticks)

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        low, high = self._xs
        return self.left + (self.right - self.left) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        """Return the vertical place of a value."""
        low, high, at = *self._ys, value
        if self._log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.bottom - (self.bottom - self.top) * (at - low) / (high - low)

    def grid(self) -> str:
        """Return the lines and names of the y axis."""
        rows = [(self.y(value), name) for value, name in self.y_ticks]
        lines = "".join(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>' for y, _ in rows)
        return lines + "".join(text_at(self.left - 7, y + 4, name, "end") for y, name in rows)

    def axes(self, x_label: str) -> str:
        """Return both axes."""
        low, high = self._xs
        ticks = [value for value in _ticks(low, high, most=6) if low <= value <= high] if high > low else [low]
        named = _named(ticks, even=True)
        names = "".join(text_at(self.x(value), self.bottom + 17, name, "middle") for value, name in named)
        return self.grid() + names + text_at(self.right, self.bottom + 34, x_label, "end")

    def svg(self, body: str, label: str) -> str:
        """Return the chart around what is drawn in it; `label` is for screen readers."""
        return (
            f'<svg class="chart" viewBox="0 0 {self._size[0]:g} {self._size[1]:g}" role="img" '
            f'aria-label="{escape(label)}">{self._legend}{body}</svg>'
        )


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


def limits_of(values: Sequence[float], log: bool) -> Point:
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


def legend_of(names: Sequence[tuple[str, int]], y_label: str, width: float, *, dashed: bool) -> tuple[str, float]:
    """Return the y axis's label and the legend, in rows, and how far down they reach."""
    row, x, drawn = (
        (_LEGEND_ROW if y_label else 0.0),
        12.0,
        text_at(12, 15, y_label, "start", "name") if y_label else "",
    )
    for name, color in names if len(names) > 1 or dashed is False else ():
        text = name if len(name) <= 40 else f"…{name[-39:]}"
        taken = 26 + LETTER * len(text)
        if x > 12 and x + taken > width:
            x, row = 12.0, row + _LEGEND_ROW
        dash = ' stroke-dasharray="4 3"' if dashed and color >= COLORS else ""
        drawn += f'<path class="s{color % COLORS}"{dash} stroke-width="4" d="M{x:.1f} {row + 10:.1f}h14"/>'
        drawn += text_at(x + 19, row + 15, text, "start", "name")
        x += taken + 6
    return drawn, row + (_LEGEND_ROW if x > 12 else 0) + 12


def text_at(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    """Return a text, or nothing for an empty one; `anchor` is start, middle or end."""
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def tooltip(text: str) -> str:
    """Return what a browser shows where the pointer rests on an element."""
    return f"<title>{escape(text)}</title>"


def empty(size: tuple[float, float], reason: str) -> str:
    """Return a chart without values, with the reason."""
    middle = text_at(size[0] / 2, size[1] / 2, reason, "middle")
    return f'<svg class="chart" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{reason}">{middle}</svg>'
