"""What a fine-tuning is made from: the user's data, recognized by content, and the state of all that is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.files import sha256

_TABLES = (".csv", ".tsv")
_JSON = (".json", ".jsonl", ".ndjson")
_HASHED = 64 * 2**20  # bytes; of larger files size and time of writing are compared


@dataclass(frozen=True)
class Source:
    """How `prepare` reads the data.

    Attributes:
        format: its first argument.
        options: the options that name the files.
        shards: the folder of tars that need no preparation; `format` is "shards" then.
    """

    format: str
    options: tuple[str, ...]
    shards: Path | None = None


def source_of(data: Path, images: Path | None, given: str | None) -> Source:
    """Recognize the data by content.

    Args:
        data: a file of annotations, or a folder of images with captions, or of tars.
        images: the folder of the images; None: the one that the annotations are in.
        given: the format as the user names it; None: recognized.

    Raises:
        DataError: there is no such data, or it is of no known form.
    """
    if not data.exists():
        raise DataError(f"--data {data}: no such file or folder; correct the path")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images}: no such folder; it is what the image paths in --data are relative to")
    if data.is_dir():
        return _folder(data, images, given)
    form = given or _format_of(data)
    return Source(form, ("--annotations", str(data), "--image-root", str(images or data.parent)))


def _folder(data: Path, images: Path | None, given: str | None) -> Source:
    names = [path.name for path in data.iterdir() if not path.name.startswith(".")]
    if given is None and any(name.endswith(".tar") for name in names):
        return Source("shards", (), data)
    files = [name for name in names if Path(name).suffix in _JSON and not name.startswith("metadata.")]
    if given is None and len(files) == 1:
        return source_of(data / files[0], images or data, None)
    if not names:
        raise DataError(f"--data {data}: the folder is empty")
    return Source(given or "caption-folder", ("--root", str(data), *(("--image-root", str(images)) if images else ())))


def _format_of(data: Path) -> str:
    """Return the format of a file of annotations, from its first bytes."""
    if data.suffix.lower() in _TABLES:
        return "caption-folder"
    with data.open("rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text[:1] not in ("[", "{"):
        raise DataError(
            f"--data {data}: neither JSON, JSON lines, a table (.csv, .tsv) nor parquet; name its format with --format "
            "as `tinygptv-ds prepare --help` lists them, or convert it to JSON lines of image, question and answer"
        )
    return "llava" if text[0] == "[" else "jsonl"


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


def count_entries(data: Path) -> int | None:
    """Return the number of entries of a JSON file up to a size that is read in a moment, or None."""
    if data.is_dir() or data.suffix.lower() not in _JSON or data.stat().st_size > _HASHED:
        return None
    text = data.read_text(encoding="utf-8-sig", errors="replace")
    try:
        whole = json.loads(text)
    except ValueError:
        return sum(1 for line in text.splitlines() if line.strip())
    return len(whole) if isinstance(whole, list) else 1
