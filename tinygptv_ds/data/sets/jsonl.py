"""JSON data of a user: one object per line, or a file in LLaVA's format."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinygptv_ds.data.sets.common import Built, Entry, Samples, SkipEntry, inside, load_entries, turn
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_TAG

_MARK = "<image>"
_Record = Callable[[dict[str, Any], int], dict[str, Any]]  # (entry, number of its images) -> record
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")


class JsonLine(NamedTuple):
    """One line of a JSON lines file; `number` counts from 1."""

    file: Path
    number: int
    text: bytes

    def __str__(self) -> str:
        return self.text.decode(errors="replace").strip()


def jsonl(root: Path, annotations: Path | None = None, image_root: Path | None = None) -> Iterator[Entry]:
    """Yield a sample per line of `annotations`, or of every ``*.jsonl`` in `root`; images in `image_root` or `root`.

    A line is an object with "image" (a path, a list of paths, or absent) and one of

    - "question" or "instruction", and "answer";
    - "conversations": ``[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]``;
    - "caption".

    Texts stay as they are. ``<image>`` in the questions marks the place of an image (see `llava`).
    """
    return _lines([annotations] if annotations else sorted(root.glob("*.jsonl")), image_root or root, _record)


def llava(root: Path, annotations: Path | None = None, image_root: Path | None = None) -> Iterator[Entry]:
    """Yield the samples of a file in LLaVA's format, `annotations` or the only ``*.json`` or ``*.jsonl`` in `root`.

    It is a list of items, or one per line, each with "conversations" and, unless it is text alone, "image": a path or
    several, below `image_root` or `root`.

    Texts stay as they are. Each ``<image>`` in the questions is the place of an image, in their order. A single
    image whose mark begins or ends the first question, or that has no mark, comes in front as TinyGPT-V knows it.
    """
    found = [annotations] if annotations else sorted(root.glob("*.json*"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{root}: which file holds the conversations? There are: {names}; name it with --annotations")
    folder = image_root or root
    if found[0].suffix == ".jsonl":
        return _lines(found, folder, _conversation)
    entries, file = load_entries(found[0]), found[0].name
    return Samples(
        entries,
        lambda item: _built(item, folder, _conversation),
        where=lambda position, item: f"{file}: entry {position}" + (f" (id {item['id']})" if _has_id(item) else ""),
    )


def _has_id(item: Any) -> bool:
    return isinstance(item, dict) and "id" in item


def _lines(files: list[Path], folder: Path, record: _Record) -> Iterator[Entry]:
    lines = (JsonLine(file, n, text) for file in files for n, text in enumerate(file.open("rb"), 1) if text.strip())
    return Samples(
        lines,
        lambda line: _built(json.loads(line.text), folder, record),
        total=sum(count_lines(file) for file in files),
        where=lambda _, line: f"{line.file.name}:{line.number}",
    )


def count_lines(file: Path) -> int:
    """Return the number of lines that are not blank."""
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _built(entry: dict[str, Any], folder: Path, record: _Record) -> Built:
    names = entry.get("image") or []
    images = [inside(folder, name) for name in ([names] if isinstance(names, str) else names)]
    return record(entry, len(images)) | {field: entry[field] for field in ("id", "task") if field in entry}, images


def _record(entry: dict[str, Any], num_images: int) -> dict[str, Any]:
    if "caption" in entry:
        return {"caption": entry["caption"], "clean": []}
    if "conversations" in entry:
        return _conversation(entry, num_images)
    pairs = [[entry["question"] if "question" in entry else entry["instruction"], entry["answer"]]]
    raw = _place_images(pairs, num_images)
    return turn(None, *pairs[0], raw=raw)


def _conversation(entry: dict[str, Any], num_images: int) -> dict[str, Any]:
    pairs = _pairs(entry["conversations"])
    raw = _place_images(pairs, num_images)
    return {"conversation": pairs, "clean": [], "raw": raw}


def _pairs(turns: list[dict[str, str]]) -> list[list[Any]]:
    for number, spoken in enumerate(turns):
        if spoken["from"] not in (_ANSWERING if number % 2 else _ASKING):
            raise SkipEntry("bad_record", f"turn {number} is from {spoken['from']!r}; human and gpt must alternate")
    values = [spoken["value"] for spoken in turns] + [None] * (len(turns) % 2)
    return [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]


def _place_images(pairs: list[list[Any]], num_images: int) -> bool:
    """Replace the marks in the questions by image tags; return False if the images go in front, which needs no tag."""
    marks = sum(question.count(_MARK) for question, _ in pairs)
    if not marks:
        return False
    if marks != num_images:
        raise SkipEntry("bad_record", f"the questions hold {_MARK} {marks} time(s) for {num_images} image(s)")
    first = pairs[0][0].strip()
    if num_images == 1 and (first.startswith(_MARK) or first.endswith(_MARK)):
        pairs[0][0] = first.replace(_MARK, "").strip()
        return False
    for pair in pairs:
        pair[0] = pair[0].replace(_MARK, IMAGE_TAG)
    return True
