"""Images of a user with captions, in a text file next to each image or in a table."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.data.sets.common import Built, Entry, Samples, SkipEntry
from tinygptv_ds.data.sets.own import Columns, own_samples, visible
from tinygptv_ds.data.sets.own_entries import caption_record
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES

_TABLES = ("*.csv", "*.tsv", "*.parquet")
_METADATA = tuple(f"metadata.{kind}" for kind in ("jsonl", "csv", "tsv", "parquet"))  # Hugging Face's image folders
_CAPTION_ENDINGS = (".txt", ".caption")
# What images are called, whether or not they can be decoded; other files count as images if they have a caption.
_IMAGE_ENDINGS = {f".{suffix}" for suffix in IMAGE_SUFFIXES | UNREAD_SUFFIXES}


class Captioned(NamedTuple):
    """An image, or None where there is a caption without one, and the text files that could hold its caption."""

    image: Path | None
    texts: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.image or self.texts[0])


def caption_folder(
    root: Path, annotations: Path | None = None, image_root: Path | None = None, columns: Columns | None = None
) -> Iterator[Entry]:
    """Yield the images and captions of a table, or of the images below `root` that have a text file of their name.

    The table is `annotations`, else the only ``*.csv``, ``*.tsv`` or ``*.parquet`` in `root`, else every
    ``metadata.jsonl`` (or .csv, .tsv, .parquet) below it, whose paths start from its own folder. The paths of a
    table start from `image_root` or `root`, which without a table is the folder of the images. `columns` renames the
    table's columns (`parse_columns`). The text file of ``a.jpg`` is ``a.txt``, ``a.caption`` or ``a.jpg.txt``.
    """
    tables = caption_tables(root, annotations)
    folder = image_root or root
    if tables:
        return own_samples(
            [(table, folder if table.parent == root or annotations else table.parent) for table in tables], columns
        )
    return _text_files(folder)


def caption_tables(root: Path, annotations: Path | None = None) -> list[Path]:
    """Return the tables that `caption_folder` reads. Raises DataError if it is not clear which."""
    if annotations:
        return [annotations]
    found = visible(root, *_TABLES) + visible(root, "metadata.jsonl")
    if len(found) > 1 and not all(path.suffix == ".parquet" for path in found):
        names = ", ".join(table.name for table in found)
        raise DataError(f"{root}: which table holds the captions? There are: {names}; name it with --annotations")
    return found or [path for path in folder_files(root) if path.name in _METADATA]


def folder_files(root: Path) -> list[Path]:
    """Return all files below `root`, sorted, but for hidden ones and the folders that systems make for themselves."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def folder_state(root: Path) -> str:
    """Return a hash of the names, sizes and times of writing of the files that `caption_folder` reads below `root`."""
    state = sha256()
    for path in folder_files(root):
        if path.suffix.lower() in (*_CAPTION_ENDINGS, *_IMAGE_ENDINGS) or path.name in _METADATA:
            stat = path.stat()
            state.update(
                f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape")
            )
    return state.hexdigest()


def _text_files(root: Path) -> Iterator[Entry]:
    found = _captioned(folder_files(root))
    if not any(entry.image for entry in found):
        raise DataError(
            f"{root}: holds neither a table of captions (.csv, .tsv, .parquet, metadata.jsonl) nor images "
            f"(.jpg, .png, ...); a JSON file is read with: tinygptv-ds prepare llava"
        )

    def build(entry: Captioned) -> Built:
        if entry.image is None:
            raise SkipEntry("missing_image", "there is no image of this name")
        record, notes = caption_record(_caption(entry))
        return {**record, "id": str(entry.image.relative_to(root))}, [entry.image], notes

    return Samples(found, build, where=lambda _, entry: str(entry))


def _captioned(files: list[Path]) -> list[Captioned]:
    """Match images with the text files of their names; what has no counterpart is kept, to be counted."""
    texts: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in _CAPTION_ENDINGS:
            texts.setdefault(str(path.with_suffix("")), []).append(path)
    found: list[Captioned] = []
    used: set[Path] = set()
    for path in files:
        if path.suffix.lower() in _CAPTION_ENDINGS:
            continue
        own = tuple(texts.get(str(path), [])) or tuple(texts.get(str(path.with_suffix("")), []))
        used.update(own)
        if own or path.suffix.lower() in _IMAGE_ENDINGS:
            found.append(Captioned(path, own))
    alone = [Captioned(None, (path,)) for paths in texts.values() for path in paths if path not in used]
    return sorted(found + alone, key=str)


def _caption(entry: Captioned) -> str:
    assert entry.image is not None
    if not entry.texts:
        raise SkipEntry("missing_caption", f"no {entry.image.with_suffix('.txt').name} next to the image")
    read = {path.name: _read(path) for path in entry.texts}
    if len(set(read.values())) > 1:
        raise SkipEntry("ambiguous_caption", f"{' and '.join(read)} hold different captions; keep one of them")
    caption = next(iter(read.values()))
    if not caption:
        raise SkipEntry("empty_answer", f"{entry.texts[0].name} is empty")
    return caption


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SkipEntry("unreadable_caption", f"{path.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise SkipEntry("unreadable_caption", f"{path.name}: {error.strerror}") from error
