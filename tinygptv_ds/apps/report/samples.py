"""The sample panel on a page: each image with its boxes, the prompt, the true and the generated answer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tinygptv_ds.apps.demo.grounding import Region, find_regions, text_spans
from tinygptv_ds.apps.report.run_data import PanelAnswer, RunData
from tinygptv_ds.charts.style import COLORS
from tinygptv_ds.processing.boxes import Box, find_boxes

MOST = 12  # answers of a run that are shown
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
STYLE = """
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: .9rem }
.sample { border: 1px solid var(--grid); border-radius: 10px; overflow: hidden; background: var(--ground) }
.sample figure { position: relative; margin: 0; aspect-ratio: 1; background: var(--band) }
.sample img { display: block; width: 100%; height: 100%; image-rendering: pixelated }
.sample img.large { image-rendering: auto }
.sample svg { position: absolute; inset: 0; width: 100%; height: 100% }
.sample rect { fill: none; stroke-width: 2.5px; vector-effect: non-scaling-stroke }
.sample .halo { stroke: #000; stroke-width: 4.5px; opacity: .55 }
.sample .true { stroke: #fff; stroke-dasharray: 5 4 } .sample .asked { stroke: #fff; stroke-dasharray: 1 4 }
.sample dl { margin: 0; padding: .6rem .75rem; font-size: .86rem; line-height: 1.45 }
.sample dt { color: var(--faint); font-size: .74rem; margin-top: .35rem } .sample dt:first-child { margin-top: 0 }
.sample dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
.sample .prompt { color: var(--faint); font-size: .78rem; max-height: 7.5em; overflow: auto }
.sample b { font-weight: 650 } .same { color: var(--c2) } .none { color: var(--faint); font-style: italic }
"""


def sample_cards(run: RunData) -> str:
    """Return the panel of a run; empty where there is none."""
    cards = "".join(_card(each) for each in run.panel[:MOST])
    return f'<div class="samples">{cards}</div>' if cards else ""


def _card(each: PanelAnswer) -> str:
    regions = find_regions(each.answer)
    asked, true = ([found.box for found in find_boxes(text)] for text in (each.prompt, each.truth))
    boxes = _overlay(regions, true, asked)
    figures = "".join(_figure(file, boxes) for file in each.images)
    truth = "".join(text for text, _ in text_spans(each.truth, find_regions(each.truth)))
    same = ' <span class="same">✓ the same</span>' if each.answer.strip() == each.truth.strip() else ""
    return (
        f'<article class="sample">{figures}<dl>'
        f'<dt>asked</dt><dd class="prompt">{escape(each.prompt)}</dd>'
        f"<dt>true answer</dt><dd>{escape(truth)}</dd>"
        f"<dt>generated{same}</dt><dd>{_answer(each.answer, regions)}</dd></dl></article>"
    )


def _answer(answer: str, regions: list[Region]) -> str:
    """Return an answer with its phrases in the colors of their boxes."""
    if not answer.strip():
        return '<span class="none">(an empty answer)</span>'
    return "".join(
        escape(text) if number is None else f'<b style="color: var(--c{number % COLORS})">{escape(text)}</b>'
        for text, number in text_spans(answer, regions)
    )


def _figure(file: Path, boxes: str) -> str:
    try:
        data = file.read_bytes()
    except OSError:
        return ""
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    if kind is None:
        return ""
    large = ' class="large"' if len(data) > 40_000 else ""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<figure><img{large} src="data:image/{kind};base64,{encoded}" alt="an image of the panel">{boxes}</figure>'


def _overlay(regions: Sequence[Region], true: Sequence[Box], asked: Sequence[Box]) -> str:
    """Draw boxes: generated ones solid in their colors, true ones dashed, those of the question dotted."""
    drawn = [_rect(box, "asked") for box in asked] + [_rect(box, "true") for box in true]
    drawn += [
        _rect(box, "", f"var(--c{number % COLORS})") for number, region in enumerate(regions) for box in region.boxes
    ]
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'


def _rect(box: Box, kind: str, color: str = "") -> str:
    x1, y1, x2, y2 = box
    place = f'x="{min(x1, x2):g}" y="{min(y1, y2):g}" width="{abs(x2 - x1):g}" height="{abs(y2 - y1):g}"'
    style = f' style="stroke: {color}"' if color else ""
    return f'<rect class="halo" {place}/><rect class="{kind}" {place}{style}/>'
