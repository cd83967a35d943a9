"""Boxes in texts: `{<x1><y1><x2><y2>}`, integers in per cent of the image's width and height (MiniGPT-v2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[float, float, float, float]

_SIDE = r"<(-?\d{1,4})>"  # a box may stick out of its image
_BOX = re.compile(r"\{" + _SIDE * 4 + r"\}")


class FoundBox(NamedTuple):
    """A box, and the characters `start` to `end` of the text that give it."""

    start: int
    end: int
    box: Box


def find_boxes(text: str) -> list[FoundBox]:
    """Return every box (x1, y1, x2, y2) of a text, in per cent."""
    boxes = []
    for found in _BOX.finditer(text):
        x1, y1, x2, y2 = map(float, found.groups())
        boxes.append(FoundBox(*found.span(), (x1, y1, x2, y2)))
    return boxes


def pixel_box(numbers: Sequence[float], width: float, height: float, resolution: float = 100) -> Box:
    """Convert four numbers, of which `resolution` span the image, to (x1, y1, x2, y2) in pixels.

    Raises:
        ValueError: other than four numbers.
    """
    x1, y1, x2, y2 = numbers
    return (x1 / resolution * width, y1 / resolution * height, x2 / resolution * width, y2 / resolution * height)


def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2) in the same units."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = _area(a) + _area(b) - width * height
    return width * height / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
