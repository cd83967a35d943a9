"""The readers of a user's own annotation files: ``llava``, ``jsonl``, and the tables of ``caption-folder``.

All three read every kind of file that own_rows.py knows and every spelling that own_texts.py and own_images.py know;
they differ in the files that they look for below ``--root``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.data.sets.common import Entry, Row, Samples
from tinygptv_ds.data.sets.own_entries import build_entry
from tinygptv_ds.data.sets.own_rows import read_rows
from tinygptv_ds.errors import DataError

Columns = Mapping[str, str]


class _Placed(NamedTuple):
    """A row with the folder from which its paths start."""

    row: Row
    folder: Path

    def __str__(self) -> str:
        return str(self.row)


def llava(
    root: Path, annotations: Path | None = None, image_root: Path | None = None, columns: Columns | None = None
) -> Iterator[Entry]:
    """Yield the samples of a file of conversations, `annotations` or the only one in `root`.

    That is a ``*.json``, ``*.jsonl`` or ``*.ndjson``, else all ``*.parquet``, else the only ``*.csv`` or ``*.tsv``.
    Images are below `image_root` or `root`; `columns` renames keys (`parse_columns`).

    Texts stay as they are. Each ``<image>`` in the questions is the place of an image, in their order. A single
    image whose mark begins or ends the first question, or that has no mark, comes in front as TinyGPT-V knows it.
    """
    found = [annotations] if annotations else _only(root, "*.json", "*.jsonl", "*.ndjson")
    found = found or visible(root, "*.parquet") or _only(root, "*.csv", "*.tsv")
    if not found:
        raise DataError(f"{root}: which file holds the conversations? There are: none; name it with --annotations")
    return own_samples([(file, image_root or root) for file in found], columns)


def jsonl(
    root: Path, annotations: Path | None = None, image_root: Path | None = None, columns: Columns | None = None
) -> Iterator[Entry]:
    """Yield a sample per line of `annotations`, or of every ``*.jsonl`` in `root`; the rest is as in `llava`.

    A line is an object with "image" (a path, a list of paths, or absent) and one of

    - "question" or "instruction", and "answer";
    - "conversations": ``[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]``;
    - "caption".
    """
    files = [annotations] if annotations else visible(root, "*.jsonl")
    return own_samples([(file, image_root or root) for file in files], columns)


def own_samples(files: list[tuple[Path, Path]], columns: Columns | None) -> Iterator[Entry]:
    """Yield the samples of annotation files, each with the folder from which its paths start."""
    parts = [(read_rows(file), folder) for file, folder in files]
    rows = (_Placed(row, folder) for (found, _), folder in parts for row in found)
    return Samples(
        rows,
        lambda placed: build_entry(placed.row.value, placed.folder, columns or {}),
        total=sum(total for (_, total), _ in parts),
        where=lambda _, placed: placed.row.where,
    )


def visible(root: Path, *patterns: str) -> list[Path]:
    """Return the files in `root` that match a pattern and are not hidden, sorted by name."""
    return sorted(
        path for pattern in patterns for path in root.glob(pattern) if not path.name.startswith(".") and path.is_file()
    )


def _only(root: Path, *patterns: str) -> list[Path]:
    found = visible(root, *patterns)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{root}: which file holds the conversations? There are: {names}; name it with --annotations")
    return found
