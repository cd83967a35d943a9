"""A user's own data: JSON lines with pictures, or a folder of pictures with a text file beside each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import Built, Entry, SkipEntry, convert, inside, turn
from tinygptv_ds.data.sets.llava import first_question
from tinygptv_ds.processing.text import IMAGE_TAG

_MARK = "<image>"
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def jsonl(root: Path) -> Iterator[Entry]:
    """Every line of every ``*.jsonl`` in `root`; picture paths are relative to `root`.

    A line is an object with "image" (a path, a list of paths, or absent) and one of

    - "question" or "instruction", and "answer";
    - "conversations": ``[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]``;
    - "caption".

    Texts stay as they are. With several pictures, ``<image>`` in the questions says where each belongs.
    """

    def build(line: str) -> Built:
        entry = json.loads(line)
        names = entry.get("image", [])
        pictures = [inside(root, name) for name in ([names] if isinstance(names, str) else names or [])]
        record = _record(entry, len(pictures))
        return record | {field: entry[field] for field in ("id", "task") if field in entry}, pictures

    lines = (line for file in sorted(root.glob("*.jsonl")) for line in file.open(encoding="utf-8") if line.strip())
    yield from convert(lines, build)


def caption_folder(root: Path) -> Iterator[Entry]:
    """Every picture below `root` with the caption in the text file of the same name (``a.jpg``, ``a.txt``)."""
    pictures = sorted(path for path in root.rglob("*") if path.suffix.lower() in _PICTURES)

    def build(picture: Path) -> Built:
        try:
            caption = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise SkipEntry(
                "missing_caption", f"{picture}: has no {picture.with_suffix('.txt').name} beside it"
            ) from None
        return {"caption": caption, "clean": [], "id": str(picture.relative_to(root))}, [picture]

    yield from convert(pictures, build)


def _record(entry: dict[str, Any], num_images: int) -> dict[str, Any]:
    if "caption" in entry:
        return {"caption": entry["caption"], "clean": []}
    if "conversations" in entry:
        pairs = _pairs(entry["conversations"])
    else:
        pairs = [[entry["question"] if "question" in entry else entry["instruction"], entry["answer"]]]
    raw = num_images > 1 and any(_MARK in question for question, _ in pairs)
    if raw:
        pairs = [[question.replace(_MARK, IMAGE_TAG), answer] for question, answer in pairs]
    elif _MARK in pairs[0][0]:
        pairs[0][0] = first_question(pairs[0][0])
    if "conversations" in entry:
        return {"conversation": pairs, "clean": [], "raw": raw}
    return turn(None, *pairs[0], raw=raw)


def _pairs(turns: list[dict[str, str]]) -> list[list[str | None]]:
    for number, spoken in enumerate(turns):
        if spoken["from"] not in (_ANSWERING if number % 2 else _ASKING):
            raise SkipEntry("bad_record", f"turn {number} is from {spoken['from']!r}; human and gpt must alternate")
    values = [spoken["value"] for spoken in turns] + [None] * (len(turns) % 2)
    return [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]
