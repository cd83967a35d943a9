"""JSON and JSON lines of a user, whichever a file holds, however it is called."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import Row, SkipEntry
from tinygptv_ds.errors import DataError

_LISTS = (
    "annotations",
    "data",
    "entries",
    "samples",
    "items",
    "records",
    "examples",
    "rows",
)  # keys that hold the list
_LINES_ENDINGS = (".jsonl", ".ndjson")


def read_json(file: Path) -> tuple[Iterator[Row], int]:
    """Return the rows of a JSON document that is or holds a list, or of JSON lines, and their number.

    A line that is no JSON is a row that cannot be read; a document that is none raises DataError with the line.
    """
    with file.open("rb") as opened:
        first, *more = islice((line for line in opened if line.strip()), 3)
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] not in (b"[", b"{") and file.suffix.lower() not in _LINES_ENDINGS:
        begins = start[:40].decode(errors="replace")
        raise DataError(f"{file}: is neither JSON nor JSON lines; it begins with {begins!r}")
    if more and _is_object(first):
        return _lines(file), count_lines(file)
    try:
        return _document(file)
    except DataError:
        if any(map(_is_object, more)):  # JSON lines, of which the first is broken
            return _lines(file), count_lines(file)
        raise


def count_lines(file: Path) -> int:
    """Return the number of lines that are not blank."""
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield Row(f"{file.name}:{number}", _parsed_line(line))


def _parsed_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return SkipEntry("bad_record", f"is not UTF-8 ({error.reason}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return SkipEntry("bad_record", f"is no JSON ({error}): {line[:200].decode(errors='replace').strip()}")


def _document(file: Path) -> tuple[Iterator[Row], int]:
    entries = _entries(file, _load(file))

    def where(position: int, entry: Any) -> str:
        own = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
        return f"{file.name}: entry {position}{own}"

    return (Row(where(position, entry), entry) for position, entry in enumerate(entries)), len(entries)


def _load(file: Path) -> Any:
    data = file.read_bytes()
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        ends = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        cut = "is cut short" if ends else "is no JSON"
        raise DataError(f"{file}: {cut}: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file}: line {line} is not UTF-8; save it as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{file}: is no list of entries, its values are nested too deep") from error


def _entries(file: Path, content: Any) -> list[Any]:
    """Return the list in a JSON document: itself, or under one of the usual keys; one entry alone is a list of one."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        key = next((key for key in _LISTS if isinstance(content.get(key), list)), None)
        if key is not None:
            return _with_file_names(content[key], content.get("images"))
        if content and all(isinstance(value, dict) for value in content.values()):  # by id
            return [{"id": key, **value} for key, value in content.items()]
        if any(isinstance(value, str | list) for value in content.values()):
            return [content]
    raise DataError(f"{file}: holds no list of entries (nor one under {', '.join(_LISTS)}); is it the right file?")


def _with_file_names(entries: list[Any], images: Any) -> list[Any]:
    """Put the names of COCO's list of images into the entries that refer to them by `image_id`."""
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        return entries
    names = {image.get("id"): image.get("file_name") for image in images}
    return [
        {"file_name": names[entry["image_id"]], **entry}
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), int | str) and entry["image_id"] in names
        else entry
        for entry in entries
    ]
