"""Boxes in answers: `{<x1><y1><x2><y2>}`, integers in per cent of the image's width and height (MiniGPT-v2).

`counts_as_hit` is the score of RefCOCO, RefCOCO+ and RefCOCOg, right by default and as TinyGPT-V's script computes it
with `compat`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinygptv_ds.processing.boxes import Box, pixel_box

HIT_IOU = 0.5  # a box that overlaps more than this is a hit

_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def clean_box_answer(answer: str) -> str:
    """The answer without `<unk>`, without spaces anywhere and without white space around it."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def is_well_formed(cleaned: str) -> bool:
    """Whether a cleaned answer starts with a box; what follows it is not looked at."""
    return _BOX.match(cleaned) is not None


def parse_box(answer: str) -> Box | None:
    """The box that an answer starts with, spaces and `<unk>` aside; None where it is not well formed."""
    match = _BOX.match(clean_box_answer(answer))
    return tuple(float(number) for number in match.groups()) if match else None


def integers(cleaned: str) -> list[int]:
    """Every run of digits of an answer, signs and decimal points being no part of them."""
    return [int(digits) for digits in re.findall(r"\d+", cleaned)]


def corners(box: Sequence[float]) -> Box:
    """(x, y, width, height), as COCO and RefCOCO store boxes, as (x1, y1, x2, y2)."""
    x, y, width, height = box
    return x, y, x + width, y + height


def pixel_iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes (x1, y1, x2, y2) whose last row and column of pixels belong to them.

    The convention of MiniGPT-v2's RefCOCO scores: a side is x2 - x1 + 1 pixels long. A box whose corners are the wrong
    way round has a negative area there and can give a negative zero.
    """
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    union = _pixels(a) + _pixels(b) - width * height
    return width * height / union if union else 0.0


def counts_as_hit(
    answer: str,
    truth: Sequence[float],
    width: float,
    height: float,
    *,
    resolution: float = 100,
    any_form: bool = False,
    compat: bool = False,
) -> bool:
    """Whether an answer's box, its first four numbers, overlaps the true one by more than half (`pixel_iou`).

    Args:
        answer: as generated.
        truth: (x, y, width, height) in pixels.
        width: of the image in pixels.
        height: likewise.
        resolution: how many steps of the answer's numbers span the image.
        any_form: look for the numbers in an answer that does not start with a box too. The original does so in the
            fifth round of asking again.
        compat: as the original, whose exception on more than four numbers makes a miss of every answer with a digit
            after its box.
    """
    cleaned = clean_box_answer(answer)
    numbers = integers(cleaned)
    if not (any_form or is_well_formed(cleaned)) or len(numbers) < 4 or (compat and len(numbers) > 4):
        return False
    return pixel_iou(pixel_box(numbers[:4], width, height, resolution), corners(truth)) > HIT_IOU


def _pixels(box: Box) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
