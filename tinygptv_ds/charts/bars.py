"""Stacked bars as SVG, for the same pages as `charts/lines.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinygptv_ds.charts.axes import Frame, legend_of, short, text_at, tooltip
from tinygptv_ds.charts.style import COLORS, HEIGHT, WIDTH


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
    legend = legend_of([(part, number) for number, part in enumerate(parts)], y_label, size[0], dashed=False)
    frame = Frame((-0.5, len(bars) - 0.5), (0.0, 1.05 * top), False, size, legend)
    body, width = [frame.grid()], 0.68 * (frame.x(1) - frame.x(0))
    for number, (label, values) in enumerate(bars):
        below = 0.0
        for part, (name, value) in enumerate(values.items()):
            y, height = frame.y(below + value), frame.y(below) - frame.y(below + value)
            body.append(
                f'<rect class="f{part % COLORS}" x="{frame.x(number) - width / 2:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}">{tooltip(f"{label}: {name} {short(value)}")}</rect>'
            )
            below += value
        body.append(text_at(frame.x(number), frame.bottom + 17, label, "middle"))
    for name, value in limits:
        y = frame.y(value)
        body.append(f'<path class="limit" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        body.append(text_at(frame.left + 6, y - 4, name, "start"))
    body.append(text_at(frame.right, frame.bottom + 34, x_label, "end"))
    return frame.svg("".join(body), f"{y_label} by {x_label}")
