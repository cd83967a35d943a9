"""Colors and style of charts, and charts as files of their own."""

from __future__ import annotations

from collections.abc import Sequence

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


def palette(theme: str) -> str:
    """Return the colors of a theme, light or dark, as declarations of CSS variables."""
    return "; ".join(f"--{name}: {value}" for name, value in THEMES[theme].items())


def standalone(chart: str, theme: str | None = None) -> str:
    """Return a chart as an SVG file with its style within it, on a ground of its own; without a theme it has both."""
    if theme is None:
        dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {palette('dark')} }} }}"
        style, ground = f"svg {{ {palette('light')} }} {dark}{STYLE}", "var(--ground)"
    else:
        style, ground = STYLE, THEMES[theme]["ground"]
        for name, value in THEMES[theme].items():
            style = style.replace(f"var(--{name})", value)
    head, body = chart.split(">", 1)
    rect = f'<rect width="100%" height="100%" style="fill: {ground}"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rect}{body}\n'


def stacked(charts: Sequence[str], size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """Return charts of the same size below each other as one."""
    width, height = size
    place = 'x="0" y="{:g}" width="{:g}" height="{:g}" '
    parts = [
        chart.replace('<svg class="chart" ', f"<svg {place.format(n * height, width, height)}", 1)
        for n, chart in enumerate(charts)
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {len(charts) * height:g}" role="img" aria-label="charts">'
        f"{''.join(parts)}</svg>"
    )
