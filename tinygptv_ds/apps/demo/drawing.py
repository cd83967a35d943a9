"""Boxes and their phrases drawn on an image, as the original's demo, MiniGPT-v2's, does it, with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tinygptv_ds.apps.demo.grounding import GRID, Region
from tinygptv_ds.processing.boxes import Box, iou, pixel_box

WIDTH = 500  # pixels of a drawn image
_MOST_HEIGHT = 2000  # a strip is drawn narrower than WIDTH
LINE = 2
_FONT_SIZE = 15  # letters as high as OpenCV's complex font at 0.5
_SPACE = 3  # around a label's text
_LONGEST = 60  # characters of a label
_SAME_LABEL = 0.95  # an equal label that lies over another by more is not drawn again

# Sixteen that differ, and that can be read as letters on white and on black.
COLOURS = (
    (230, 25, 75),
    (60, 150, 60),
    (67, 99, 216),
    (214, 110, 20),
    (145, 30, 180),
    (20, 140, 150),
    (215, 45, 200),
    (130, 130, 20),
    (190, 90, 110),
    (30, 120, 200),
    (150, 95, 40),
    (200, 40, 40),
    (90, 120, 70),
    (110, 90, 190),
    (190, 130, 0),
    (125, 125, 125),
)


def colour(number: int) -> tuple[int, int, int]:
    """Of the region of that number; the seventeenth has the first's again."""
    return COLOURS[number % len(COLOURS)]


def draw_regions(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy of the image, 500 pixels wide, with every region's boxes in its colour and its phrase at each.

    A label stands above its box, or inside where there is no room, and moves down (at the lower edge: up) to where it
    covers no other. Boxes may stick out of the image; what is outside is not drawn.
    """
    scale = min(WIDTH / image.width, _MOST_HEIGHT / image.height)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    drawn = image.convert("RGB").resize(size)
    font = ImageFont.load_default(_FONT_SIZE)
    placed: list[tuple[str, Box]] = []
    for number, region in enumerate(regions):
        for box in region.boxes:
            x1, y1, x2, y2 = map(int, pixel_box(box, *size, GRID))
            left, top, right, bottom = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
            ImageDraw.Draw(drawn).rectangle((left, top, right, bottom), outline=colour(number), width=LINE)
            if region.phrase:
                _label(drawn, font, region.phrase[:_LONGEST], (left, top), colour(number), placed)
    return drawn


def _label(
    drawn: Image.Image,
    font: ImageFont.FreeTypeFont,
    text: str,
    corner: tuple[int, int],
    ink: tuple[int, int, int],
    placed: list[tuple[str, Box]],
) -> None:
    """Draw a label at the upper left corner of its box, and add where it is to `placed`."""
    text = " ".join(text.split())
    height = sum(font.getmetrics()) + 2 * _SPACE
    width = min(drawn.width, height + _SPACE + int(font.getlength(text)))
    above = corner[1] - height
    first = above if above >= 0 else corner[1] + LINE
    left = _within(corner[0], drawn.width - width)
    place = (left, _within(first, drawn.height - height))
    area = (place[0], place[1], place[0] + width, place[1] + height)
    if any(text == other and iou(area, taken) > _SAME_LABEL for other, taken in placed):
        return
    top = _free_row(area, drawn.height, [taken for _, taken in placed])
    area = (left, top, left + width, top + height)
    placed.append((text, area))
    mark = height // 2 + _SPACE  # a strip of the colour, then white, half of the image seen through both
    _blend(drawn, (left, top, left + mark, top + height), ink)
    _blend(drawn, (left + mark, top, left + width, top + height), (255, 255, 255))
    ImageDraw.Draw(drawn).text((left + mark + _SPACE, top + _SPACE), text, fill=(0, 0, 0), font=font)


def _free_row(area: Box, lower_edge: int, taken: Sequence[Box]) -> int:
    """The nearest row below, or else above, at which the area covers none of the others; its own if there is none."""
    left, first, right, bottom = map(int, area)
    height = bottom - first
    for below in (True, False):
        top = first
        while 0 <= top <= max(first, lower_edge - height):
            met = [other for other in taken if _overlap((left, top, right, top + height), other)]
            if not met:
                return top
            top = int(max(other[3] for other in met)) if below else int(min(other[1] for other in met)) - height
    return first


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(value: int, most: int) -> int:
    return max(0, min(value, most))


def _blend(drawn: Image.Image, area: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
    left, top, right, bottom = area
    right, bottom = min(right, drawn.width), min(bottom, drawn.height)
    if left < right and top < bottom:
        below = drawn.crop((left, top, right, bottom))
        drawn.paste(Image.blend(below, Image.new("RGB", below.size, ink), 0.5), (left, top))
