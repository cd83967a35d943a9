"""Scores of boxes in answers: `{<x1><y1><x2><y2>}`, integers in per cent of the image's width and height (MiniGPT-v2).

`counts_as_hit` is the score of RefCOCO, RefCOCO+ and RefCOCOg: correct by default, and with `compat` as TinyGPT-V's
script computes it. `processing/boxes.py` reads boxes for display, which is more lenient.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinygptv_ds.processing.boxes import Box, pixel_box

HIT_IOU = 0.5  # a box that overlaps more than this is a hit

# What the original's score accepts: boxes of up to three digits and no sign, unlike those that are shown to people.
_SCORED_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def clean_box_answer(answer: str) -> str:
    """Return the answer without `<unk>`, without any spaces and without surrounding white space."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def is_well_formed(cleaned: str) -> bool:
    """Return whether a cleaned answer starts with a box, whatever follows it."""
    return _SCORED_BOX.match(cleaned) is not None


def parse_box(answer: str) -> Box | None:
    """Return the box that an answer starts with, ignoring spaces and `<unk>`; None if it is not well formed."""
    match = _SCORED_BOX.match(clean_box_answer(answer))
    if match is None:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    return x1, y1, x2, y2


def integers(cleaned: str) -> list[int]:
    """Return every run of digits of an answer, without signs and decimal points."""
    return [int(digits) for digits in re.findall(r"\d+", cleaned)]


def corners(box: Sequence[float]) -> Box:
    """Convert (x, y, width, height), as COCO and RefCOCO store boxes, to (x1, y1, x2, y2)."""
    x, y, width, height = box
    return x, y, x + width, y + height


def pixel_iou(a: Box, b: Box) -> float:
    """Return the intersection over union of boxes (x1, y1, x2, y2) that include their last row and column of pixels.

    This is the convention of MiniGPT-v2's RefCOCO scores: a side is x2 - x1 + 1 pixels long. A box with swapped corners
    has a negative area and can give a negative zero.
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
    """Return whether the box of an answer, its first four numbers, has a `pixel_iou` above one half with the true one.

    Args:
        answer: as generated.
        truth: (x, y, width, height) in pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.
        resolution: the number of steps, in the numbers of the answer, that span the image.
        any_form: accept numbers of an answer that does not start with a box, as the original does in the fifth round
            of asking again.
        compat: score as the original, where an exception on more than four numbers makes every answer with a digit
            after its box a miss.
    """
    cleaned = clean_box_answer(answer)
    numbers = integers(cleaned)
    if not (any_form or is_well_formed(cleaned)) or len(numbers) < 4 or (compat and len(numbers) > 4):
        return False
    return pixel_iou(pixel_box(numbers[:4], width, height, resolution), corners(truth)) > HIT_IOU


def _pixels(box: Box) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
