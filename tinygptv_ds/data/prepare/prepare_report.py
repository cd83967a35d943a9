"""The report of a preparation, and the part of it about one shard."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tinygptv_ds.data.sets.common import PreparedSample, Skipped
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.files import whole_file

_LISTED = 1_000  # skipped entries that are named one by one; all are counted


@dataclass
class ShardReport:
    """The part of the report about one chunk of entries, whose hash is `digest`.

    `shard` is the name of its tar, if there is one, `state` the tar's size in bytes and time of writing in ns.
    """

    digest: str
    samples: int = 0
    with_images: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    shard: str | None = None
    state: list[int] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    missing_fields: dict[str, int] = field(default_factory=dict)
    skipped_entries: list[dict[str, str]] = field(default_factory=list)

    def skip(self, entry: Skipped) -> None:
        """Count an entry that gave no sample."""
        _add(self.skipped, {entry.reason: 1})
        if entry.field is not None:
            _add(self.missing_fields, {entry.field: 1})
        if len(self.skipped_entries) < _LISTED:
            self.skipped_entries.append({"key": entry.key, "reason": entry.reason, "detail": entry.detail})

    def add(self, sample: PreparedSample, changes: Iterable[str]) -> None:
        """Count an entry that gave a sample, and what was changed in its texts and images."""
        self.samples += 1
        self.with_images += bool(sample.images)
        _add(self.notes, Counter([*sample.notes, *changes]))

    def is_whole(self, out: Path) -> bool:
        """Return whether the shard is in `out` as it was written; a lost index is built again."""
        if self.shard is None:
            return self.samples == 0
        tar = out / self.shard
        return tar.is_file() and file_state(tar) == self.state and sample_count(tar) == self.samples


@dataclass
class PrepareReport:
    """The result of a preparation, kept as report.json next to the shards.

    `with_images` counts the samples that have an image, `notes` what was changed in samples. `skipped` counts entries
    that could not be used by reason, `missing_fields` those that lack a field by its name, `skipped_entries` names the
    first thousand. `reused` is True if the shards were already there.
    """

    settings: dict[str, Any]
    samples: int = 0
    with_images: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    missing_fields: dict[str, int] = field(default_factory=dict)
    skipped_entries: list[dict[str, str]] = field(default_factory=list)
    reused: bool = False

    @classmethod
    def of(cls, settings: dict[str, Any], parts: Iterable[ShardReport]) -> Self:
        """Return the sum of `parts`, in their order."""
        report = cls(settings)
        for part in parts:
            report.samples += part.samples
            report.with_images += part.with_images
            _add(report.notes, part.notes)
            report.shards += [part.shard] if part.shard else []
            _add(report.skipped, part.skipped)
            _add(report.missing_fields, part.missing_fields)
            report.skipped_entries += part.skipped_entries[: _LISTED - len(report.skipped_entries)]
        return report

    def __str__(self) -> str:
        images = f"{self.with_images} with images, {self.samples - self.with_images} without"
        text = f"{self.samples} samples ({images}) in {len(self.shards)} shard(s), skipped: {_counts(self.skipped)}"
        if self.missing_fields:
            text += f"; missing fields: {_counts(self.missing_fields)}"
        return f"{text}; changed: {_counts(self.notes)}" if self.notes else text


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    counts.update(Counter(counts) + Counter(more))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def save(made: ShardReport | PrepareReport, path: Path) -> None:
    """Write a part or a report as JSON, atomically."""
    text = json.dumps(asdict(made), indent=1, ensure_ascii=False)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def load_part(path: Path) -> ShardReport | None:
    """Read the part in a file; None if it is missing or damaged."""
    try:
        return ShardReport(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def file_state(path: Path) -> list[int]:
    """Return the size in bytes and time of writing in ns, which change when the file does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
