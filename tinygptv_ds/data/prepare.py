"""The command ``prepare``: a dataset's own files -> shards, once; what could not be used is counted and listed."""

import argparse
import fcntl
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from tinygptv_ds.data.sets import PreparedSample, Skipped, dataset, how_to_get
from tinygptv_ds.data.sets.common import Entry, SkipEntry
from tinygptv_ds.data.shards import ShardWriter
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import render

log = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 10_000
DIGITS_TRAIN, DIGITS_TEST = 2_000, 500  # samples of each embedded dataset
_LISTED = 1_000  # skipped entries that the report names one by one; all are counted
_MARKER = ".preparing"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@dataclass
class Report:
    """What a preparation made; kept as report.json beside the shards.

    `skipped` counts entries that could not be used by reason, `skipped_entries` names the first thousand. `reused` is
    True if the shards were already there.
    """

    settings: dict[str, Any]
    samples: int = 0
    shards: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_entries: list[dict[str, str]] = field(default_factory=list)
    reused: bool = False

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items())) or "none"
        return f"{self.samples} samples in {len(self.shards)} shard(s), skipped: {skipped}"


def prepare(
    name: str, root: Path, out: Path, *, samples_per_shard: int = SAMPLES_PER_SHARD, limit: int | None = None
) -> Report:
    """Write dataset `name` from the files below `root` as shards into `out`; only the first `limit` entries if given.

    Raises DataError if files are missing, nothing could be used, or `out` holds something else.
    """
    entry = dataset(name)
    if entry.samples is None:
        raise DataError(how_to_get(name))
    present = {file: sorted(root.glob(file)) for file in entry.files}
    missing = [file for file, found in present.items() if not found]
    if missing or not root.is_dir():
        raise DataError(f"{root}: not found: {', '.join(missing) or 'the folder itself'}\n{how_to_get(name)}")
    sources = {str(path): _state(path) for found in present.values() for path in found if path.is_file()}
    settings = {
        "dataset": name,
        "root": str(root.resolve()),
        "samples_per_shard": samples_per_shard,
        "limit": limit,
        "sources": sources,
    }
    samples = islice(entry.samples(root), limit)
    return write_samples(samples, out, samples_per_shard=samples_per_shard, total=limit, settings=settings)


def prepare_digits(
    out: Path, *, samples_per_shard: int = SAMPLES_PER_SHARD, limit: int | None = None, seed: int = 0
) -> dict[str, Report]:
    """Make the embedded datasets: ``out/<dataset>/<split>/00000.tar``. `limit` bounds the samples of each."""
    from tinygptv_ds.data.sets.digits import DIGIT_SETS, samples

    reports = {}
    for name in DIGIT_SETS:
        for split, size in (("train", DIGITS_TRAIN), ("test", DIGITS_TEST)):
            size = size if limit is None else min(size, limit)
            settings = {"dataset": name, "split": split, "size": size, "seed": seed}
            settings["samples_per_shard"] = samples_per_shard
            reports[f"{name}/{split}"] = write_samples(
                samples(name, split, size, seed),
                out / name / split,
                samples_per_shard=samples_per_shard,
                total=size,
                settings=settings,
            )
    return reports


def write_samples(
    samples: Iterable[Entry], out: Path, *, samples_per_shard: int, total: int | None, settings: dict[str, Any]
) -> Report:
    """Write `samples` as shards with indexes and report.json; `total` is for the progress bar alone.

    A finished `out` with the same `settings` is reused without touching `samples`, an unfinished one is started anew.
    """
    settings = json.loads(json.dumps(settings))  # as it will be read back
    done = _finished(out, settings)
    if done is not None:
        return done
    with _workspace(out), ShardWriter(out, samples_per_shard) as writer:
        report = Report(settings)
        skipped: Counter[str] = Counter()
        for entry in tqdm(samples, out.name, total, unit="sample", disable=None):
            try:
                if isinstance(entry, Skipped):
                    raise SkipEntry(entry.reason, entry.detail)
                writer.write(entry.key, _members(entry))
            except SkipEntry as skip:
                skipped[skip.reason] += 1
                if len(report.skipped_entries) < _LISTED:
                    report.skipped_entries.append({"key": entry.key, "reason": skip.reason, "detail": str(skip)})
            else:
                report.samples += 1
        report.skipped = dict(skipped)
        if report.samples == 0:
            first = f"; the first: {report.skipped_entries[0]['detail']}" if skipped else ""
            raise DataError(f"{out}: not one sample could be prepared, skipped: {report.skipped or 'none'}{first}")
        writer.finish()
        report.shards = [tar.name for tar in writer.tars]
        _write_report(out, report)
    return report


# ---- one sample ------------------------------------------------------------------------------------------------------


def _members(sample: PreparedSample) -> dict[str, bytes]:
    """The sample's files by suffix. Raises SkipEntry if a picture or the record cannot be used."""
    try:
        render(sample.record, len(sample.images), lambda n: n - 1)
    except DataError as error:
        raise SkipEntry("bad_record", str(error)) from error
    pictures = [_picture(image) for image in sample.images]
    if len(pictures) == 1:
        members = dict(pictures)
    else:
        members = {f"{number}.{suffix}": data for number, (suffix, data) in enumerate(pictures)}
    members["json"] = json.dumps(sample.record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return members


@lru_cache(maxsize=4)  # neighbouring entries often share a picture
def _picture(image: Path | bytes) -> tuple[str, bytes]:
    """(suffix by content, bytes as they are). Only the header is looked at."""
    where = str(image) if isinstance(image, Path) else "picture"
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(data)) as opened:
            kind = opened.format
    except FileNotFoundError as error:
        raise SkipEntry("missing_image", f"{where} does not exist") from error
    except UnidentifiedImageError as error:
        raise SkipEntry("not_an_image", f"{where} is no picture") from error
    except Image.DecompressionBombError as error:
        raise SkipEntry("too_large_image", f"{where}: {error}") from error
    except OSError as error:
        raise SkipEntry("unreadable_image", f"{where}: {error}") from error
    if kind not in _SUFFIXES:
        raise SkipEntry("unsupported_image", f"{where} is of the format {kind}")
    return _SUFFIXES[kind], data


# ---- the output folder -----------------------------------------------------------------------------------------------


def _finished(out: Path, settings: dict[str, Any]) -> Report | None:
    """The report of a finished preparation with these settings, None if there is none."""
    path = out / "report.json"
    if not path.exists():
        return None
    try:
        report = Report(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is no report of this program ({error}); choose another folder") from error
    if report.settings != settings:
        names = sorted(report.settings.keys() | settings.keys())
        differing = [name for name in names if report.settings.get(name) != settings.get(name)]
        raise DataError(
            f"{out}: holds shards made with other settings ({', '.join(differing)}); remove it or choose another folder"
        )
    lost = [name for name in report.shards if not (out / name).is_file()]
    if lost:
        raise DataError(f"{out}: {lost[0]} is gone since it was made; remove the folder to make it anew")
    log.info("%s: reused, it was made with the same settings", out)
    report.reused = True
    return report


@contextmanager
def _workspace(out: Path) -> Iterator[None]:
    """`out` empty but for a marker that says the shards in it are unfinished, and held by this process alone."""
    marker = out / _MARKER
    if out.exists() and not marker.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty, and not a preparation of this program; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with marker.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another process is preparing into this folder; let it finish") from error
        for pattern in ("[0-9]*.tar", "[0-9]*.tar.idx", ".[0-9]*.tmp", ".[0-9]*.idx.*"):
            for left_over in out.glob(pattern):
                left_over.unlink()
        yield
    marker.unlink()


def _write_report(out: Path, report: Report) -> None:
    temporary = out / ".report.json.tmp"
    temporary.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(out / "report.json")


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``prepare``."""
    parser.add_argument("name", help="dataset to prepare: 'digits' (embedded), a published one, 'jsonl', ...")
    parser.add_argument("--root", type=Path, default=Path(), help="folder with the dataset's own files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="use only the first entries")


def run(args: argparse.Namespace) -> None:
    """Carry out ``prepare`` and print what was made."""
    options = {"samples_per_shard": args.samples_per_shard, "limit": args.limit}
    if args.name == "digits":
        reports = prepare_digits(args.out, **options)
    else:
        reports = {args.name: prepare(args.name, args.root, args.out, **options)}
    for name, report in reports.items():
        print(f"{name}: {report}" + (" (was already there)" if report.reused else ""))
