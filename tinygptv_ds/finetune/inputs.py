"""What a fine-tuning is made from: the user's data, recognized by content, and the state of all that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinygptv_ds.data.sets.own import visible
from tinygptv_ds.data.sets.own_rows import read_rows
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import sha256

ANNOTATIONS = "llava"  # the reader of `prepare` for every kind of annotation file
_HASHED = 64 * 2**20  # bytes; of larger files size and time of writing are compared


@dataclass(frozen=True)
class Source:
    """How `prepare` reads the data.

    Attributes:
        format: its first argument.
        options: the options that name the files.
        shards: the folder of tars that need no preparation; `format` is "shards" then.
        entries: number of annotations where that is known at once.
    """

    format: str
    options: tuple[str, ...]
    shards: Path | None = None
    entries: int | None = None


def source_of(data: Path, images: Path | None, given: str | None = None, columns: Sequence[str] = ()) -> Source:
    """Recognize the data by content.

    Args:
        data: a file of annotations, or a folder of images with captions, of annotations and images, or of tars.
        images: the folder of the images; None: the one that the annotations are in.
        given: the format as the user names it; None: recognized.
        columns: changes to the names of keys, for `prepare --columns`.

    Raises:
        DataError: there is no such data, or it is of no known form.
    """
    if not data.exists():
        raise DataError(f"--data {data}: no such file or folder; correct the path")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images}: no such folder; it is what the image paths in --data are relative to")
    renamed = tuple(word for change in columns for word in ("--columns", change))
    if data.is_file():
        options = ("--annotations", str(data), "--image-root", str(images or data.parent), *renamed)
        return Source(given or ANNOTATIONS, options, entries=read_rows(data)[1])
    if given is None and visible(data, "*.tar"):
        return Source("shards", (), data)
    if not any(data.iterdir()):
        raise DataError(f"--data {data}: the folder is empty")
    files = [file for file in visible(data, "*.json", "*.jsonl", "*.ndjson") if file.stem != "metadata"]
    options = ("--root", str(data), *(("--image-root", str(images)) if images else ()), *renamed)
    return Source(given or (ANNOTATIONS if files else "caption-folder"), options)


def state_of(path: Path) -> str:
    """Return a line by which a changed file or folder is noticed: its place, size and content."""
    place = path.resolve()
    if path.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
        newest = max((file.stat().st_mtime_ns for file in files), default=0)
        return f"{place}: {len(files)} files, {sum(file.stat().st_size for file in files)} bytes, of {newest}"
    stat = place.stat()
    mark = sha256(place)[:16] if stat.st_size <= _HASHED else str(stat.st_mtime_ns)
    return f"{place}: {stat.st_size} bytes, {mark}"


def require_new_or_ours(out: Path, work: Path) -> None:
    """Check that nothing of the user's would be replaced.

    Raises:
        ConfigError: `out` is there and is not the result of a fine-tuning whose work is in `work`.
    """
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not work.is_dir():
        raise ConfigError(f"--out {out} is there already, and not from this command; choose another --out")
