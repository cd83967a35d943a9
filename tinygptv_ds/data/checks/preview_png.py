"""A page of previews as one image: a grid of cards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.checks.preview_html import LIGHT, amounts, enlargement, place, summary, visible
from tinygptv_ds.data.checks.preview_samples import CUT, IMAGE, LEARNT, PROMPT, TURN, Piece, Preview
from tinygptv_ds.files import whole_file
from tinygptv_ds.processing.boxes import pixel_box

COLUMNS, WIDTH, EDGE = 3, 460, 14  # cards a row, pixels inside a card, pixels around it
_SIZE, _LINE = 14, 22  # pixels of a letter and of a line
_INK, _FAINT, _GROUND, _RED = "#1c1c1a", "#6b6b66", "#f6f6f4", "#a33327"
_PLAIN, _NOTE, _ALERT = "plain", "note", "alert"
_GROUNDS = {
    PROMPT: ("#f0f0ec", "#e5e5df"),
    LEARNT: ("#d5efd3", "#c2e5c0"),
    CUT: ("#fbe3e0", "#fbe3e0"),
    IMAGE: ("#ffffff", "#ffffff"),
}
_INKS = {CUT: _RED, _ALERT: _RED, IMAGE: _FAINT, _NOTE: _FAINT}


class Word(NamedTuple):
    """Some letters of a piece and where they stand: x and y in pixels, from the top left of the text."""

    x: float
    y: float
    text: str
    piece: Piece


def write_png(out: Path, previews: Sequence[Preview], *, title: str, recipe: Recipe, source: str) -> None:
    """Write the page to `out`, whole or not at all."""
    cards = [_card(preview) for preview in previews]
    rows = [cards[first : first + COLUMNS] for first in range(0, len(cards), COLUMNS)]
    across = COLUMNS * (WIDTH + 3 * EDGE) + EDGE
    head = [Piece(f"{title}\n{summary(recipe, source)}\n", _PLAIN, 0), *_legend()]
    text = _laid_out(head, across - 2 * EDGE)
    top = _height(text) + 2 * EDGE
    page = Image.new("RGB", (across, top + sum(max(c.height for c in row) + EDGE for row in rows)), _GROUND)
    _write(ImageDraw.Draw(page), text, EDGE, EDGE)
    for row in rows:
        for column, card in enumerate(row):
            page.paste(card, (EDGE + column * (card.width + EDGE), top))
        top += max(card.height for card in row) + EDGE
    with whole_file(out) as partial:
        page.save(partial, "PNG")


def _legend() -> Iterator[Piece]:
    for kind, text in ((PROMPT, "read"), (LEARNT, "learnt"), (CUT, "cut off"), (IMAGE, "an image's tokens")):
        yield Piece(text, kind, 0)
        yield Piece("   ", _PLAIN, 0)
    yield Piece("shades tell tokens apart; boxes have the colour of their words", _PLAIN, 0)


def _card(preview: Preview) -> Image.Image:
    """One sample on white: what it is, its images, its words."""
    note = f"{place(preview)}\n{preview.shard}: {preview.key}\n"
    note += "" if preview.skipped else amounts(preview)
    head = _laid_out([Piece(f"{preview.ref.dataset}\n", _PLAIN, 0), Piece(note, _NOTE, 0)], WIDTH)
    pieces = preview.pieces
    if preview.skipped:
        pieces = [Piece("left out: {}\n{}".format(*preview.skipped), _ALERT, 0)]
    words = _laid_out(pieces, WIDTH)
    images = [_image(preview, number) for number in range(len(preview.images))]
    places = _places(images, top=EDGE + _height(head) + EDGE // 2)
    below = max((y + side for _, y, side in places), default=_height(head)) + EDGE
    card = Image.new("RGB", (WIDTH + 2 * EDGE, below + _height(words) + EDGE), "white")
    draw = ImageDraw.Draw(card)
    _write(draw, head, EDGE, EDGE)
    for (x, y, _), image in zip(places, images, strict=True):
        card.paste(image, (x, y))
    _write(draw, words, EDGE, below)
    return card


def _image(preview: Preview, number: int) -> Image.Image:
    """An image with its boxes, small ones enlarged, those that are too wide for a card made to fit."""
    image = Image.fromarray(preview.images[number].transpose(1, 2, 0))
    side = min(WIDTH, image.width * enlargement(image.width))
    image = image.resize((side, side), Image.Resampling.NEAREST if side > image.width else Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    for colour, (of, box) in enumerate(preview.boxes):
        if of == number:
            x1, y1, x2, y2 = pixel_box(box, side - 1, side - 1)
            corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            draw.rectangle(corners, outline="white", width=4)
            draw.rectangle(corners, outline=LIGHT[colour % len(LIGHT)], width=2)
    return image


def _places(images: Sequence[Image.Image], top: int) -> list[tuple[int, int, int]]:
    """(x, y, side) of a card's images, side by side as far as they fit; all have one size."""
    if not images:
        return []
    side = images[0].width
    across = max(1, (WIDTH + EDGE) // (side + EDGE))
    spots = [divmod(number, across) for number in range(len(images))]
    return [(EDGE + column * (side + EDGE), top + row * (side + EDGE), side) for row, column in spots]


# ---- words -----------------------------------------------------------------------------------------------------------


def _laid_out(pieces: Sequence[Piece], width: int) -> list[Word]:
    """The pieces as lines of at most `width` pixels, broken between words or, where one is too long, within."""
    words, x, y = [], 0.0, 0
    for piece in pieces:
        for part in _parts(piece, width):
            length = _FONT.getlength(part)
            if part == "\n" or (x and x + length > width):
                x, y = 0.0, y + _LINE
            if part != "\n":
                words.append(Word(x, y, part, piece))
                x += length
    return words


def _parts(piece: Piece, width: int) -> Iterator[str]:
    """Words with the spaces before them, line ends, and the single letters of words that no line can hold."""
    text = "\n" if piece.kind == TURN else visible(piece.text) if piece.kind in _GROUNDS else piece.text
    for part in re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", text):
        if _FONT.getlength(part) <= width:
            yield part
        else:
            yield from part


def _write(draw: ImageDraw.ImageDraw, words: Sequence[Word], left: int, top: int) -> None:
    for word in words:
        piece, x, y = word.piece, left + word.x, top + word.y
        end, base = x + _FONT.getlength(word.text), y + _LINE - 4
        if piece.kind in _GROUNDS:
            draw.rectangle((x, y, end, base), fill=_GROUNDS[piece.kind][piece.token % 2])
        boxed = None if piece.box is None else LIGHT[piece.box % len(LIGHT)]
        ink = boxed or _INKS.get(piece.kind, _INK)
        draw.text((x, y), word.text, fill=ink, font=_FONT)
        if piece.kind == LEARNT:
            draw.line((x, base, end, base), fill="#2b8a3e", width=2)
        if piece.kind == CUT:
            draw.line((x, y + _LINE / 2 - 2, end, y + _LINE / 2 - 2), fill=_RED)


def _height(words: Sequence[Word]) -> int:
    return max((int(word.y) + _LINE for word in words), default=0)


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu where the system has it, for the many scripts it knows; else Pillow's own, which knows English."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", _SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return ImageFont.load_default(_SIZE)


_FONT = _font()
