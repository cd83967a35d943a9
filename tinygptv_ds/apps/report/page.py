"""The page of a report: one HTML file without scripts, which loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from tinygptv_ds.apps.report import samples, tables
from tinygptv_ds.apps.report.curves import charts as curves
from tinygptv_ds.apps.report.run_data import RunData
from tinygptv_ds.charts.style import STYLE, palette

# Nothing but the page itself, whatever a caption or an answer holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: clamp(.9rem, 3vw, 2.2rem); max-width: 84rem; background: var(--band); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; letter-spacing: -.01em }
h2 { font-size: 1.12rem; margin: 2.2rem 0 .7rem; letter-spacing: -.005em }
h3 { font-size: .92rem; font-weight: 600; margin: 0 5.2rem .35rem 0 }
h3 small { font-weight: 400; color: var(--faint); font-size: .8rem; margin-left: .3rem }
header p { color: var(--faint); margin: .35rem 0 0; overflow-wrap: anywhere }
.notes { list-style: none; padding: 0; margin: .9rem 0 0; font-size: .9rem }
.notes li { border-left: 3px solid var(--c6); padding: .1rem 0 .1rem .7rem; margin: .3rem 0; overflow-wrap: anywhere }
.card, details { background: var(--ground); border: 1px solid var(--grid); border-radius: 12px; padding: .85rem 1rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .9rem;
  margin-top: 1.4rem }
.charts .card { position: relative; min-width: 0 }
.charts label { position: absolute; top: .8rem; right: .9rem; font-size: .78rem; color: var(--faint); cursor: pointer;
  border: 1px solid var(--grid); border-radius: 99px; padding: .05rem .6rem; user-select: none }
.charts input { position: absolute; top: .95rem; right: 2.4rem; opacity: 0; pointer-events: none }
.charts input:checked + label { color: var(--ground); background: var(--ink); border-color: var(--ink) }
.charts input:focus-visible + label { outline: 2px solid var(--c0); outline-offset: 2px }
.charts .log, .charts input:checked ~ .linear { display: none } .charts input:checked ~ .log { display: block }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .7rem; margin: 1.3rem 0 0 }
.tiles div { background: var(--ground); border: 1px solid var(--grid); border-radius: 12px; padding: .6rem .9rem }
.tiles dt { color: var(--faint); font-size: .78rem } .tiles dd { margin: 0; white-space: nowrap;
  font-size: 1.15rem; font-weight: 620; font-variant-numeric: tabular-nums; letter-spacing: -.01em }
main > .card:first-child { margin-top: 1.4rem }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: var(--faint); white-space: nowrap }
th, td { padding: .38rem 1.1rem .38rem 0; border-bottom: 1px solid var(--grid); vertical-align: top }
tr:last-child td { border-bottom: 0 } td { white-space: nowrap }
.text td:not(:first-child) { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 26rem }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, monospace }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .5em }
.bar { display: inline-block; width: 6.5rem; height: .6em; border-radius: 3px; background: var(--grid);
  vertical-align: baseline; overflow: hidden } .bar i { display: block; height: 100% }
details { margin: .6rem 0 } summary { cursor: pointer; font-weight: 600; font-size: .92rem }
details[open] summary { margin-bottom: .7rem }
.hint { color: var(--faint); font-size: .84rem; margin: -.35rem 0 .7rem }
footer { color: var(--faint); font-size: .82rem; margin-top: 2.4rem; overflow-wrap: anywhere }
@media (max-width: 40rem) { .card, details { padding: .7rem .75rem } .tiles { grid-template-columns: 1fr 1fr }
  .tiles dd { font-size: 1.05rem } }
@media print { body { background: none } .card, .sample { break-inside: avoid } }
"""


def page(runs: Sequence[RunData], made: str) -> str:
    """Return the whole page.

    Args:
        runs: one or more.
        made: when and by what the page was made.
    """
    title = _title(runs)
    sections = "\n".join(section for section in _sections(runs) if section)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>:root {{ {palette("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {palette("dark")} }} }}
{_STYLE}{STYLE}{samples.STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{escape(_subtitle(runs))}</p>
{_notes(runs)}</header>
<main>
{sections}
</main>
<footer>{escape(made)}</footer>
</body>
</html>
"""


def _title(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        stage = runs[0].recipe.get("stage")
        return runs[0].name if stage is None else f"Stage {stage}: {runs[0].name}"
    names = ", ".join(run.name for run in runs)
    return names if len(names) <= 70 else f"{len(runs)} runs of {runs[0].path.resolve().parent.name}"


def _subtitle(runs: Sequence[RunData]) -> str:
    folders = dict.fromkeys(str(run.path if len(runs) == 1 else run.path.parent) for run in runs)
    return f"TinyGPT-V, {len(runs)} run{'s' if len(runs) > 1 else ''} in {', '.join(folders)}"


def _notes(runs: Sequence[RunData]) -> str:
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>\n' if notes else ""


def _sections(runs: Sequence[RunData]) -> Iterator[str]:
    yield _section("", tables.overview(runs)) if len(runs) > 1 else tables.tiles(runs[0])
    figures = "".join(
        f'<section class="card"><h3>{escape(title)} <small>{escape(unit)}</small></h3>{chart}</section>'
        for title, unit, chart in curves(runs)
    )
    yield f'<div class="charts">{figures}</div>' if figures else ""
    yield _section("Scores", tables.scores_table(runs), "Held-out questions; in per cent, IoU from 0 to 1.")
    yield _section("Mixture", tables.mixture_table(runs), "Samples that were trained on.")
    yield _section("Skipped samples", tables.skipped_table(runs), "Samples that could not be used, by reason.")
    yield _samples(runs)
    yield _section("Settings that differ", tables.differing_settings(runs))
    yield _section("Environment", tables.environment_table(runs))
    every = [(run, tables.settings(run)) for run in runs]
    listed = [f"<details><summary>{escape(run.name)}</summary>{text}</details>" for run, text in every if text]
    yield f"<h2>All settings</h2>{''.join(listed)}" if listed else ""


def _section(title: str, content: str, hint: str = "") -> str:
    if not content:
        return ""
    heading = f"<h2>{title}</h2>" if title else ""
    explained = f'<p class="hint">{hint}</p>' if hint else ""
    return f'{heading}{explained}<div class="card">{content}</div>'


def _samples(runs: Sequence[RunData]) -> str:
    """Return the panels: that of the last run open, those of the others to be opened."""
    shown = [(run, cards) for run in runs if (cards := samples.sample_cards(run))]
    if not shown:
        return ""
    found = []
    for run, cards in reversed(shown):
        step = "" if run.panel_step is None else f" at step {run.panel_step:,}"
        more = "" if len(run.panel) <= samples.MOST else f" ({samples.MOST} of {len(run.panel)})"
        name = f"{run.name}{step}{more}"
        opened = " open" if run is shown[-1][0] else ""
        found.append(f"<details{opened}><summary>{escape(name)}</summary>{cards}</details>")
    hint = "Boxes: generated ones solid in the color of their words, true ones dashed, those of the question dotted."
    return f'<h2>Sample answers</h2><p class="hint">{hint}</p>{"".join(found)}'
