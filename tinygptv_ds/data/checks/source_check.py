"""Checks of a dataset's own files below a root: what `prepare` would find, before it is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from tinygptv_ds.data.sets import DATASETS
from tinygptv_ds.data.sets.common import Entry, Skipped
from tinygptv_ds.errors import DataError


@dataclass
class Sources:
    """The state of a dataset's own files.

    Attributes:
        files: the files and folders that it needs below the root, and whether each is there.
        entries: annotation entries that were looked at.
        all_entries: whether these are all there are.
        missing_images: entries with an image that does not exist.
        first_missing: the first of these.
        unusable: other entries that give no sample, by reason.
        problem: why the annotations could not be read.
    """

    files: dict[str, bool]
    entries: int = 0
    all_entries: bool = False
    missing_images: int = 0
    first_missing: str | None = None
    unusable: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


def check_sources(name: str, root: Path, limit: int | None) -> Sources | None:
    """Check below `root` the files of dataset `name` and at its first `limit` entries, or all (None).

    None for a dataset that is not made by `prepare` from files of its own.
    """
    entry = DATASETS.get(name)
    if entry is None or entry.samples is None:
        return None
    sources = Sources({file: any(root.glob(file)) for file in entry.files})
    if all(there for file, there in sources.files.items() if Path(file).suffix):  # images are folders
        try:
            entries = iter(tqdm(entry.samples(root), f"{name} below {root}", unit="entry", disable=None))
            for found in islice(entries, limit):
                _count(sources, found)
            sources.all_entries = next(entries, None) is None
        except DataError as error:
            sources.problem = str(error)
    return sources


def _count(sources: Sources, entry: Entry) -> None:
    sources.entries += 1
    missing = _missing_image(entry)
    if missing is not None:
        sources.missing_images += 1
        sources.first_missing = sources.first_missing or missing
    elif isinstance(entry, Skipped):
        sources.unusable[entry.reason] = sources.unusable.get(entry.reason, 0) + 1


def _missing_image(entry: Entry) -> str | None:
    if isinstance(entry, Skipped):
        return entry.detail if entry.reason == "missing_image" else None
    away = (image for image in entry.images if isinstance(image, Path) and not image.exists())
    return next((f"{image} does not exist" for image in away), None)
