"""Boxes and their phrases drawn on an image as in MiniGPT-v2's demo, the original's.

This is the only drawing of boxes in the package. torchvision.utils.draw_bounding_boxes does not fit: it draws no label
on a background that the image shows through, moves no label that covers another, and imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tinygptv_ds.apps.demo.grounding import GRID, Region
from tinygptv_ds.processing.boxes import Box, iou, pixel_box

WIDTH = 500  # pixels of a drawn image
_MAX_HEIGHT = 2000  # a very tall image is drawn narrower than WIDTH
LINE_WIDTH = 2  # pixels
_FONT_SIZE = 15  # as high as OpenCV's complex font at scale 0.5
_PADDING = 3  # pixels around a label's text
_MAX_LABEL = 60  # characters
_SAME_LABEL_IOU = 0.95  # an equal label that overlaps another by more than this is not drawn again

# Sixteen distinct colors, readable as text on white and on black.
COLORS = (
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


def color(number: int) -> tuple[int, int, int]:
    """Return the color of a region by its number; they repeat after sixteen."""
    return COLORS[number % len(COLORS)]


def draw_regions(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """Return a copy of the image, 500 pixels wide, with the boxes of each region in its color, labeled with its phrase.

    A label is above its box, or inside it where there is no space above, and moves down (at the lower edge: up) until
    it covers no other label. Parts of boxes outside the image are not drawn.
    """
    scale = min(WIDTH / image.width, _MAX_HEIGHT / image.height)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    drawn = image.convert("RGB").resize(size)
    font = ImageFont.load_default(_FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # any default font of a given size is one
    placed: list[tuple[str, Box]] = []
    for number, region in enumerate(regions):
        for box in region.boxes:
            x1, y1, x2, y2 = map(int, pixel_box(box, *size, GRID))
            left, top, right, bottom = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
            ImageDraw.Draw(drawn).rectangle((left, top, right, bottom), outline=color(number), width=LINE_WIDTH)
            if region.phrase:
                _label(drawn, font, region.phrase[:_MAX_LABEL], (left, top), color(number), placed)
    return drawn


def _label(
    drawn: Image.Image,
    font: ImageFont.FreeTypeFont,
    text: str,
    corner: tuple[int, int],
    ink: tuple[int, int, int],
    placed: list[tuple[str, Box]],
) -> None:
    """Draw a label at the upper left corner of its box, and add its text and area to `placed`."""
    text = " ".join(text.split())
    height = sum(font.getmetrics()) + 2 * _PADDING
    width = min(drawn.width, height + _PADDING + int(font.getlength(text)))
    above = corner[1] - height
    first = above if above >= 0 else corner[1] + LINE_WIDTH
    left = _clamp(corner[0], drawn.width - width)
    place = (left, _clamp(first, drawn.height - height))
    area = (place[0], place[1], place[0] + width, place[1] + height)
    if any(text == other and iou(area, taken) > _SAME_LABEL_IOU for other, taken in placed):
        return
    top = _free_row(area, drawn.height, [taken for _, taken in placed])
    area = (left, top, left + width, top + height)
    placed.append((text, area))
    mark = height // 2 + _PADDING  # a strip of the color, then white; both half transparent
    _blend(drawn, (left, top, left + mark, top + height), ink)
    _blend(drawn, (left + mark, top, left + width, top + height), (255, 255, 255))
    ImageDraw.Draw(drawn).text((left + mark + _PADDING, top + _PADDING), text, fill=(0, 0, 0), font=font)


def _free_row(area: Box, lower_edge: int, taken: Sequence[Box]) -> int:
    """Return the nearest top row below, or else above, where the area overlaps no other; its own if there is none."""
    left, first, right, bottom = map(int, area)
    height = bottom - first
    for below in (True, False):
        top = first
        while 0 <= top <= max(first, lower_edge - height):
            hit = [other for other in taken if _overlap((left, top, right, top + height), other)]
            if not hit:
                return top
            top = int(max(other[3] for other in hit)) if below else int(min(other[1] for other in hit)) - height
    return first


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _clamp(value: int, maximum: int) -> int:
    return max(0, min(value, maximum))


def _blend(drawn: Image.Image, area: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
    left, top, right, bottom = area
    right, bottom = min(right, drawn.width), min(bottom, drawn.height)
    if left < right and top < bottom:
        below = drawn.crop((left, top, right, bottom))
        drawn.paste(Image.blend(below, Image.new("RGB", below.size, ink), 0.5), (left, top))
