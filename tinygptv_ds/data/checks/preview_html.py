"""A page of previews in one HTML file: no script, nothing to load, readable in light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.checks.preview_samples import CUT, IMAGE, PROMPT, TARGET, TURN, Piece, Preview
from tinygptv_ds.files import whole_file
from tinygptv_ds.processing.boxes import Box

LIGHT = ("#c02020", "#1668c0", "#a05a00", "#7a2fb0", "#0a7f7f", "#b8257f", "#556b00", "#4a4a9c")
DARK = ("#ff8a80", "#82b8ff", "#ffb74d", "#d5a6ff", "#5ed6d0", "#ff94cf", "#c5d95a", "#b0b0ff")
SHOWN_AT_LEAST = 224  # pixels: smaller images are shown enlarged

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f4; --card: #fff; --ink: #1c1c1a; --faint: #6b6b66; --line: #dcdcd6;
  --prompt: #f0f0ec; --prompt2: #e5e5df; --target: #d5efd3; --target2: #c2e5c0; --target-line: #2b8a3e;
  --cut: #fbe3e0; --cut-ink: #a33327; %(light)s }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --card: #20201e; --ink: #ecece6; --faint: #a0a099;
  --line: #3a3a36; --prompt: #2b2b28; --prompt2: #363632; --target: #1d3a22; --target2: #264a2c;
  --target-line: #69c77b; --cut: #43231f; --cut-ink: #ff9c8f; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 } header p { color: var(--faint); margin: .3rem 0 }
.legend span { margin-right: .8rem }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 34rem), 1fr)); gap: 1rem;
  margin-top: 1rem; align-items: start }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem; min-width: 0 }
article h2 { font-size: 1rem; margin: 0 } .where { color: var(--faint); font-size: .82rem; margin: .1rem 0 .6rem;
  overflow-wrap: anywhere }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .6rem }
figure { position: relative; margin: 0; max-width: 100%%; aspect-ratio: 1 } figure img { display: block; width: 100%%;
  height: 100%%; image-rendering: pixelated }
figure svg { position: absolute; inset: 0; width: 100%%; height: 100%%; overflow: visible }
rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke }
rect.halo { stroke: #fff; stroke-width: 5px; opacity: .75 }
.row { margin: 0; font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.prompt, .target, .cut, .image { padding: .15em 0; border-radius: 2px }
.prompt { background: var(--prompt) } .prompt.odd { background: var(--prompt2) }
.target { background: var(--target); border-bottom: 2px solid var(--target-line) }
.target.odd { background: var(--target2) }
.cut { background: var(--cut); color: var(--cut-ink); text-decoration: line-through }
.image { border: 1px dashed var(--faint); padding: .1em .4em; color: var(--faint) }
.turn { display: block; height: .5em }
.box { font-weight: 700 }
.skipped { border-color: var(--cut-ink) } .reason { color: var(--cut-ink); margin: 0; overflow-wrap: anywhere }
"""


def write_html(out: Path, previews: Sequence[Preview], *, title: str, recipe: Recipe, source: str) -> None:
    """Write the page to `out`, atomically."""
    cards = "\n".join(_card(preview) for preview in previews)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_style()}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{escape(summary(recipe, source))}</p>
<p class="legend"><span class="prompt">read</span><span class="target">target</span><span class="cut">cut off by
text.max_txt_len or text.max_context_len</span><span class="image">an image's tokens</span>alternating shades separate
tokens; boxes have the color of their words</p>
</header>
<main>
{cards}
</main>
</body>
</html>
"""
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def summary(recipe: Recipe, source: str) -> str:
    """Return the settings of the recipe that decide how samples look."""
    text = recipe.text
    return (
        f"{source}: seed {recipe.seed}, steps of {recipe.train.batch_size} samples, "
        f"images of {recipe.model.image_size} x {recipe.model.image_size} pixels, "
        f"at most {text.max_context_len} tokens of prompt and {text.max_txt_len} of answers"
    )


def place(preview: Preview) -> str:
    """Return the place of a sample in the stream."""
    return f"step {preview.step}, position {preview.ref.position}, epoch {preview.ref.epoch}"


def amounts(preview: Preview) -> str:
    """Return the token counts of a sample."""
    counts = preview.counts
    cut = f", {counts[CUT]} cut off" if counts[CUT] else ""
    return f"{counts[PROMPT] + counts[TARGET]} tokens, {counts[TARGET]} of them targets{cut}"


def _style() -> str:
    themes = {
        name: " ".join(f"--b{number}: {color};" for number, color in enumerate(colors))
        for name, colors in (("light", LIGHT), ("dark", DARK))
    }
    boxes = "".join(f".b{n} {{ color: var(--b{n}); stroke: var(--b{n}) }}\n" for n in range(len(LIGHT)))
    return _STYLE % themes + boxes


def _card(preview: Preview) -> str:
    where = f"{place(preview)} &middot; {escape(preview.shard)}: {escape(preview.key)}"
    head = f'<h2>{escape(preview.ref.dataset)}</h2>\n<p class="where">{where}'
    if preview.skipped:
        reason, message = map(escape, preview.skipped)
        return (
            f'<article class="skipped">\n{head}</p>\n<p class="reason"><strong>left out: {reason}</strong><br>{message}'
            "</p>\n</article>"
        )
    images = "".join(_image(preview, number, pixels) for number, pixels in enumerate(preview.images))
    words = "".join(_words(preview.pieces))
    return (
        f'<article>\n{head}<br>{amounts(preview)}</p>\n<div class="images">{images}</div>\n'
        f'<p class="row">{words}</p>\n</article>'
    )


def _image(preview: Preview, number: int, pixels: np.ndarray) -> str:
    side = pixels.shape[1]
    rects = "".join(_rect(n, box) for n, (image, box) in enumerate(preview.boxes) if image == number)
    label = escape(f"image {number + 1} of {preview.key}")
    return (
        f'<figure style="width: {side * enlargement(side)}px"><img src="data:image/png;base64,{_png(pixels)}" '
        f'width="{side}" height="{side}" alt="{label}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{rects}</svg></figure>'
    )


def enlargement(side: int) -> int:
    """Return the factor by which an image of `side` pixels is shown enlarged."""
    return max(1, SHOWN_AT_LEAST // side)


def _rect(number: int, box: Box) -> str:
    """Return a box in per cent, with a light halo that separates it from the image."""
    x1, y1, x2, y2 = box
    left, top, width, height = min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="halo" {place}></rect><rect class="on {_box_class(number)}" {place}></rect>'


def _box_class(number: int) -> str:
    return f"b{number % len(LIGHT)}"


def _png(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


def _words(pieces: Sequence[Piece]) -> Iterator[str]:
    for piece in pieces:
        if piece.kind == TURN:
            yield '<span class="turn"></span>'
            continue
        classes = [piece.kind]
        classes += ["odd"] if piece.kind != IMAGE and piece.token % 2 else []
        classes += ["box", _box_class(piece.box)] if piece.box is not None else []
        yield f'<span class="{" ".join(classes)}">{escape(visible(piece.text))}</span>'


def visible(text: str) -> str:
    """Return the text with visible marks at line ends."""
    return text.replace("\r", "\\r").replace("\n", "\\n\n")
