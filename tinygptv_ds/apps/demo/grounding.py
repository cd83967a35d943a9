"""The regions that an answer names, `<p>phrase</p> {<x1><y1><x2><y2>}`, and the words around them.

The rules are those of the original's demo, MiniGPT-v2's. No text makes them fail: what is malformed names nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tinygptv_ds.processing.boxes import Box, find_boxes

GRID = 100  # steps that span an image

_PHRASE = re.compile(r"<p>(.*?)\}(?!<)")  # up to a brace that no <delim> follows
_INTEGER = re.compile(r"-?\d+")
_MOST_DIGITS = 4  # a longer number is none of an image
_MARKED = re.compile(r"<p>(.*?)</p>")
_DELIMITER = re.compile(r"\s*<delim>")


@dataclass(frozen=True)
class Region:
    """What an answer points at: `boxes` (x1, y1, x2, y2) in per cent, corners in any order.

    `phrase` is None for an answer that is nothing but a box, as to `[refer]`.
    """

    phrase: str | None
    boxes: tuple[Box, ...]


def find_regions(answer: str) -> list[Region]:
    """The regions of an answer, one for each different phrase, in the order in which they come.

    An answer without any phrase, but with four integers in all of it, is one box. What has no box is left out.
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


def pieces(answer: str, regions: list[Region]) -> list[tuple[str, int | None]]:
    """The answer for reading: pieces of text, each with the number of the region that it names, if it names one.

    Where phrases have regions, boxes and `<delim>` are left out; other answers stay as they are.
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
    """The box around what is painted, as a question has it; empty where nothing is.

    Args:
        mask: of one band; what is not 0 is painted. It is looked at in 100 x 100 points, and both ends of the box
            are points that are painted: 0 to 99.
    """
    painted = np.asarray(mask.resize((GRID, GRID), Image.Resampling.NEAREST)) != 0
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    if not len(rows):
        return ""
    return f"{{<{columns[0]}><{rows[0]}><{columns[-1]}><{rows[-1]}>}}"


def with_painted_box(question: str, mask: Image.Image | None) -> str:
    """A question of the task `[identify]` with the painted box behind it, unless it says four numbers itself."""
    if "[identify]" not in question or mask is None or len(_INTEGER.findall(question)) == 4:
        return question
    return question + painted_box(mask)


def _box(text: str) -> Box | None:
    """The four integers of a text that has exactly four."""
    numbers = _INTEGER.findall(text)
    if len(numbers) != 4 or max(len(number.lstrip("-")) for number in numbers) > _MOST_DIGITS:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


def _without_boxes(answer: str) -> str:
    """Boxes, and the space before each, left out."""
    kept, at = [], 0
    for found in find_boxes(answer):
        kept.append(answer[at : found.start].rstrip())
        at = found.end
    return _DELIMITER.sub("", "".join([*kept, answer[at:]]))
