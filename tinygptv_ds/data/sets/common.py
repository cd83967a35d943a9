"""Shared parts of the dataset adapters: the samples they yield, safe paths, images and boxes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image, UnidentifiedImageError

from tinygptv_ds.errors import DataError
from tinygptv_ds.git_lfs import is_lfs_pointer
from tinygptv_ds.processing.image_formats import MAX_PIXELS

COCO = "coco/train2014"


class Row(NamedTuple):
    """One entry of an annotation file: where it is, for messages, and its value, or why it cannot be read."""

    where: str
    value: Any

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class PreparedSample:
    """One sample on its way into a shard.

    `key` is unique in its dataset, `record` is as processing/text.py reads it, `images` are encoded images or paths.
    `where` names the entry of the source in messages. `notes` name what was changed in it, for counting.
    """

    key: str
    record: dict[str, Any]
    images: tuple[Path | bytes, ...]
    where: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """An entry that gives no sample: `reason`, one word for counting; the `detail`; and `field`, if one is missing."""

    key: str
    reason: str
    detail: str
    field: str | None = None


class SkipEntry(Exception):
    """An entry that cannot be used; raised while its sample is built. `field` is the name of one that is missing."""

    def __init__(self, reason: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.field = field


Entry = PreparedSample | Skipped
# record, images and (where there are any) notes of a sample, or None for an entry outside the training set
Built = (
    tuple[dict[str, Any], Sequence[Path | bytes]] | tuple[dict[str, Any], Sequence[Path | bytes], Sequence[str]] | None
)


class Samples(Iterator[Entry]):
    """A sample for each annotation entry, one at a time; its key is the entry's number in the source, from 0.

    `build` makes one of an entry; what it raises for a broken entry becomes a `Skipped`. `where` names an entry
    in messages. `total` is the number of entries, if they have no length. `operator.length_hint` returns how many
    samples are to come, estimated from the share of entries that belonged to the training set so far.
    """

    def __init__(
        self,
        entries: Iterable[Any],
        build: Callable[[Any], Built],
        *,
        total: int | None = None,
        where: Callable[[int, Any], str] = lambda position, _: f"entry {position}",
    ) -> None:
        self._entries = enumerate(entries)
        self._build = build
        self._total = length_hint(entries, -1) if total is None else total
        self._where = where
        self._seen = self._given = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Entry:
        for position, entry in self._entries:
            self._seen += 1
            made = self._sample(position, entry)
            if made is not None:
                self._given += 1
                return made
        raise StopIteration

    def __length_hint__(self) -> int:
        if self._total < 0:
            return NotImplemented
        left = max(0, self._total - self._seen)
        return left * self._given // self._seen if self._given else left

    def _sample(self, position: int, entry: Any) -> Entry | None:
        key, where = f"{position:09d}", self._where(position, entry)
        try:
            built = self._build(entry)
        except SkipEntry as skip:
            return Skipped(key, skip.reason, f"{where}: {skip}", skip.field)
        except KeyError as error:
            field = str(error.args[0])
            return Skipped(key, "missing_field", f"{where}: has no {field!r}: {str(entry)[:200]}", field)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            return Skipped(key, "bad_record", f"{where}: {type(error).__name__}: {error} in {str(entry)[:200]}")
        if built is None:
            return None
        notes = built[2] if len(built) == 3 else ()
        return PreparedSample(key, built[0], tuple(built[1]), where, tuple(notes))


def load_json(path: Path) -> Any:
    """Read a whole JSON file. Raises DataError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        with path.open("rb") as file:
            first = file.readline()
        if is_lfs_pointer(first):
            raise DataError(
                f"{path}: is a Git LFS pointer, not the file itself; fetch that with: git lfs pull"
            ) from error
        if first.rstrip().endswith(b"}") and getattr(error, "msg", "") == "Extra data":
            raise DataError(f"{path}: holds JSON lines, not one document; is it the right file?") from error
        raise DataError(f"{path}: is no JSON ({error}); fetch it again") from error


def load_entries(path: Path, field: str = "annotations") -> list[Any]:
    """Read the list in a JSON file, which is either the whole file or its `field`."""
    content = load_json(path)
    entries = content.get(field) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds no list of entries (nor one under {field!r}); is it the right file?")
    return entries


def load_objects(path: Path, field: str = "annotations") -> list[dict[str, Any]]:
    """Read the list in a JSON file as `load_entries` does, and check that every entry is an object."""
    entries = load_entries(path, field)
    odd = next((position for position, entry in enumerate(entries) if not isinstance(entry, dict)), None)
    if odd is not None:
        raise DataError(f"{path}: entry {odd} is a {type(entries[odd]).__name__}, not an object; is it the right file?")
    return entries


def inside(root: Path, *names: object) -> Path:
    """Return the path of `names` under `root`. Raises SkipEntry if it would lead out of `root`."""
    relative = Path(os.path.normpath(Path(*map(str, names))))
    if relative.is_absolute() or relative.parts[:1] == ("..",) or "\0" in str(relative):
        raise SkipEntry("outside_root", f"image path {str(relative)!r} leads out of {root}, below which it must stay")
    return root / relative


def coco_image(root: Path, image_id: object) -> Path:
    """Return the path of the COCO 2014 training image with the (already padded) id, or of a `coco_file` like it."""
    return coco_file(root, f"COCO_train2014_{image_id}.jpg")


def coco_file(root: Path, name: str) -> Path:
    """Return the path of a COCO image by its name of 2014, ``COCO_train2014_000000000009.jpg``.

    Where it is not in train2014 it may be in val2014, or have its name of 2017 (the images are the same).
    """
    path = inside(root, COCO, name)
    number = name.removesuffix(".jpg").rpartition("_")[2]
    others = (
        *(f"coco/{part}2014/COCO_{part}2014_{number}.jpg" for part in ("train", "val")),
        *(f"coco/{folder}/{number}.jpg" for folder in ("train2017", "val2017", "train2014")),
    )
    return path if not number.isdigit() else first_file(path, *(root / other for other in others))


def first_file(path: Path, *others: Path) -> Path:
    """Return the first of several places at which there is a file; `path` if there is none."""
    return next((place for place in (path, *others) if place.is_file()), path)


@lru_cache(maxsize=64)
def read_image_size(path: Path) -> tuple[int, int]:
    """Read (width, height) in pixels from the header. Raises SkipEntry if the image is missing or none."""
    with image_errors(path), Image.open(path) as image:
        return check_pixels(image).size


def check_pixels(image: Image.Image) -> Image.Image:
    """Check the size of an opened image without decoding it. Raises DecompressionBombError if it is too large."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels (limit {MAX_PIXELS:,})")
    return image


@contextmanager
def image_errors(where: object) -> Iterator[None]:
    """Turn errors of reading the image `where` into SkipEntry."""
    try:
        yield
    except FileNotFoundError as error:
        raise SkipEntry("missing_image", f"{where} does not exist") from error
    except UnidentifiedImageError as error:
        raise SkipEntry("not_an_image", f"{where} is no image") from error
    except Image.DecompressionBombError as error:
        raise SkipEntry("too_large_image", f"{where}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SkipEntry("unreadable_image", f"{where}: {error}") from error


def box_string(box: Sequence[float], size: tuple[int, int]) -> str:
    """Format a box [x, y, width, height] in pixels as ``{<x1><y1><x2><y2>}`` in whole per cent of (width, height).

    MiniGPT-v2's arithmetic, whose order of operations decides the last digit: divide, multiply, cut off towards zero.
    Boxes that stick out of the image are not clamped.
    """
    x, y, width, height = box
    edges = (x / size[0] * 100, y / size[1] * 100, (x + width) / size[0] * 100, (y + height) / size[1] * 100)
    return "{" + "".join(f"<{int(edge)}>" for edge in edges) + "}"


def turn(
    pool: str | None, text: str | list[str], answer: str | list[str], *, clean: Sequence[str] = (), **ids: object
) -> dict[str, Any]:
    """Return the record of a single-turn sample; `clean` names the fields that pass the caption clean-up."""
    return {"pool": pool, "text": text, "answer": answer, "clean": list(clean), **ids}
