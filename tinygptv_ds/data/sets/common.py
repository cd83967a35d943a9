"""What the dataset adapters share: the sample they yield, safe paths, pictures, boxes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from tinygptv_ds.errors import DataError

COCO = "coco/train2014"


@dataclass(frozen=True)
class PreparedSample:
    """One sample on its way into a shard.

    `key` is unique in its dataset, `record` as processing/text.py reads it, `images` the encoded pictures or where they
    lie.
    """

    key: str
    record: dict[str, Any]
    images: tuple[Path | bytes, ...]


@dataclass(frozen=True)
class Skipped:
    """An entry that gives no sample: one word for counting, and what exactly is wrong."""

    key: str
    reason: str
    detail: str


class SkipEntry(Exception):
    """Raised while a sample is built: this entry cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


Entry = PreparedSample | Skipped
# record and pictures of a sample, or None for an entry that does not belong to the training set
Built = tuple[dict[str, Any], Sequence[Path | bytes]] | None


def convert(entries: Iterable[Any], build: Callable[[Any], Built]) -> Iterator[Entry]:
    """Build a sample from each annotation entry; its key is the entry's number in the source, from 0."""
    for position, entry in enumerate(entries):
        key = f"{position:09d}"
        try:
            built = build(entry)
        except SkipEntry as skip:
            yield Skipped(key, skip.reason, str(skip))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            yield Skipped(key, "bad_record", f"{type(error).__name__}: {error} in {str(entry)[:200]}")
        else:
            if built is not None:
                record, images = built
                yield PreparedSample(key, record, tuple(images))


def load_json(path: Path) -> Any:
    """A whole JSON file. Raises DataError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error}); fetch it again") from error


def load_entries(path: Path, field: str = "annotations") -> list[Any]:
    """The list in a JSON file, which is either the whole file or its `field`."""
    content = load_json(path)
    entries = content.get(field) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds no list of entries (nor one under {field!r}); is it the right file?")
    return entries


def inside(root: Path, *names: object) -> Path:
    """The path of `names` under `root`. Raises DataError where an annotation would lead out of it."""
    relative = Path(os.path.normpath(Path(*map(str, names))))
    if relative.is_absolute() or relative.parts[:1] == ("..",) or "\0" in str(relative):
        raise DataError(f"picture path {str(relative)!r} leads out of {root}; paths in annotations must stay below it")
    return root / relative


def coco_picture(root: Path, image_id: object) -> Path:
    """The training picture of COCO 2014 with the (already padded) id."""
    return inside(root, COCO, f"COCO_train2014_{image_id}.jpg")


@lru_cache(maxsize=64)
def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header. Raises SkipEntry if the picture is missing or none."""
    try:
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise SkipEntry("not_an_image", f"{path} is no picture") from error
    except Image.DecompressionBombError as error:
        raise SkipEntry("too_large_image", f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise SkipEntry("missing_image", f"{path} does not exist") from error
    except OSError as error:
        raise SkipEntry("unreadable_image", f"{path}: {error}") from error


def box_string(box: Sequence[float], size: tuple[int, int]) -> str:
    """Box [x, y, width, height] in pixels -> ``{<x1><y1><x2><y2>}`` in whole per cent of a picture (width, height).

    MiniGPT-v2's arithmetic, whose order of operations decides the last digit: divide, multiply, cut off towards zero.
    Boxes that stick out of the picture are not clamped.
    """
    x, y, width, height = box
    edges = (x / size[0] * 100, y / size[1] * 100, (x + width) / size[0] * 100, (y + height) / size[1] * 100)
    return "{" + "".join(f"<{int(edge)}>" for edge in edges) + "}"


def turn(
    pool: str | None, text: str | list[str], answer: str | list[str], *, clean: Sequence[str] = (), **ids: object
) -> dict[str, Any]:
    """The record of a single-turn sample; `clean` names those of text and answer that pass the caption clean-up."""
    return {"pool": pool, "text": text, "answer": answer, "clean": list(clean), **ids}
