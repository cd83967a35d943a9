"""Boxes in answers: `{<x1><y1><x2><y2>}`, integers in per cent of the picture's width and height (MiniGPT-v2)."""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]

_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def parse_box(answer: str) -> Box | None:
    """The box that an answer starts with, spaces aside; None where it is not well formed."""
    match = _BOX.match(answer.replace(" ", ""))
    return tuple(float(number) for number in match.groups()) if match else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same units."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = _area(a) + _area(b) - width * height
    return width * height / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
