"""Grounded answers: the regions that an answer names, `<p>phrase</p> {<x1><y1><x2><y2>}`, and its text without them.

The rules are those of MiniGPT-v2's demo, the original's. No text raises an error: malformed parts name no region.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tinygptv_ds.processing.boxes import Box, find_boxes

GRID = 100  # coordinates span an image in this many steps

_PHRASE = re.compile(r"<p>(.*?)\}(?!<)")  # up to a closing brace without <delim> after it
_INTEGER = re.compile(r"-?\d+")
_MAX_DIGITS = 4  # a longer number is not a coordinate
_MARKED = re.compile(r"<p>(.*?)</p>")
_DELIMITER = re.compile(r"\s*<delim>")


@dataclass(frozen=True)
class Region:
    """A phrase of an answer with its boxes.

    Attributes:
        phrase: None for an answer that is only a box, for example to `[refer]`.
        boxes: (x1, y1, x2, y2) in percent, corners in any order.
    """

    phrase: str | None
    boxes: tuple[Box, ...]


def find_regions(answer: str) -> list[Region]:
    """Find the regions of an answer, one for each distinct phrase, in order of appearance.

    An answer without a phrase that holds exactly four integers is one box. Phrases without a box are omitted.
    """
    whole = answer[: answer.rfind("}") + 1] or answer
    found = _PHRASE.findall(whole)
    if not found:
        box = _box(answer)
        return [Region(None, (box,))] if box else []
    boxes: dict[str, list[Box]] = {}
    for text in found:
        phrase, *places = text.split("</p>")
        if len(places) == 1:
            boxes.setdefault(phrase.strip(), []).extend(filter(None, map(_box, places[0].split("<delim>"))))
    return [Region(phrase, tuple(of_it)) for phrase, of_it in boxes.items() if of_it]


def text_spans(answer: str, regions: list[Region]) -> list[tuple[str, int | None]]:
    """Split an answer into readable spans of text, each with the number of the region that it names, or None.

    Where phrases have regions, boxes and `<delim>` are removed; other answers are one span, unchanged.
    """
    numbers = {region.phrase: number for number, region in enumerate(regions) if region.phrase is not None}
    if not numbers:
        return [(answer, None)] if answer else []
    parts, cut = _MARKED.split(_without_boxes(answer)), []  # text and phrase in turn
    for at, text in enumerate(parts):
        if text:
            cut.append((text, numbers.get(text.strip()) if at % 2 else None))
    return cut


def painted_box(mask: Image.Image) -> str:
    """Return the bounding box of the painted pixels as text for a question; empty if nothing is painted.

    Args:
        mask: an image of one channel, not 0 where it is painted. It is sampled at 100 x 100 points; both corners of
            the box are painted points, 0 to 99.
    """
    painted = np.asarray(mask.resize((GRID, GRID), Image.Resampling.NEAREST)) != 0
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    if not len(rows):
        return ""
    return f"{{<{columns[0]}><{rows[0]}><{columns[-1]}><{rows[-1]}>}}"


def with_painted_box(question: str, mask: Image.Image | None) -> str:
    """Append the painted box to a question of the task `[identify]`, unless it holds four numbers already."""
    if "[identify]" not in question or mask is None or len(_INTEGER.findall(question)) == 4:
        return question
    return question + painted_box(mask)


def _box(text: str) -> Box | None:
    """Return the four integers of a text that has exactly four."""
    numbers = _INTEGER.findall(text)
    if len(numbers) != 4 or max(len(number.lstrip("-")) for number in numbers) > _MAX_DIGITS:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def _without_boxes(answer: str) -> str:
    """Remove boxes, the space before each, and delimiters."""
    kept, at = [], 0
    for found in find_boxes(answer):
        kept.append(answer[at : found.start].rstrip())
        at = found.end
    return _DELIMITER.sub("", "".join([*kept, answer[at:]]))
