"""The output folder of a preparation: held by one process, resumed after an interruption, finished once."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygptv_ds.data.prepare.prepare_report import PrepareReport, ShardReport, load_part, save
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import FileLock, LockedError, LockRemovedError, fingerprint_differences, lock_file, sync

log = logging.getLogger(__name__)

_MARKER = ".preparing"  # holds the settings while shards are being made
_HALF_MADE = (".[0-9]*.tmp", ".[0-9]*.idx.*", ".[0-9]*.partial", "report.json.partial")
_MADE = ("[0-9]*.tar", "[0-9]*.tar.idx", ".[0-9]*.part")


def finished(out: Path, settings: dict[str, Any]) -> PrepareReport | None:
    """Return the report of a finished preparation with these settings, or None."""
    path = out / "report.json"
    if not path.exists():
        return None
    try:
        report = PrepareReport(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is no report of this program ({error}); choose another folder") from error
    _check_settings(out, report.settings, settings)
    lost = [name for name in report.shards if not (out / name).is_file()]
    if lost:
        raise DataError(f"{out}: {lost[0]} was removed after it was made; remove the folder to make it again")
    _tidy(out, report)  # in case it was interrupted just before
    log.info("%s: reused, it was made with the same settings", out)
    report.reused = True
    return report


@contextmanager
def workspace(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock the folder `out` for this process; it then holds only what an interrupted preparation with the same settings
    has finished. Raises DataError if it holds anything else, or if another process has the lock.
    """
    marker = out / _MARKER
    if out.exists() and (not out.is_dir() or (not marker.exists() and any(out.iterdir()))):
        raise DataError(f"{out}: is not empty, and not a preparation of this program; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out, marker):
        _remove(out, _HALF_MADE)
        _take_over(out, marker, settings)
        try:
            yield
        except KeyboardInterrupt:
            log.warning("%s: interrupted; the same command resumes from the finished shards", out)
            raise
        finally:
            _remove(out, _HALF_MADE)
            if [path.name for path in out.iterdir()] == [_MARKER]:
                marker.unlink()
                out.rmdir()


def finish(out: Path, settings: dict[str, Any], parts: Sequence[Path]) -> PrepareReport:
    """Sum up `parts`, write report.json and remove temporary files.

    Raises DataError if there is no sample; nothing is left in `out` then.
    """
    report = PrepareReport.of(settings, (_part(path) for path in parts))
    if report.samples == 0:
        _remove(out, _MADE)
        first = f"; the first: {report.skipped_entries[0]['detail']}" if report.skipped_entries else ""
        hint = "; paths of images start from --image-root, or else --root" if "missing_image" in report.skipped else ""
        raise DataError(f"{out}: not one sample could be prepared, skipped: {report.skipped or 'none'}{first}{hint}")
    save(report, out / "report.json")
    _tidy(out, report)
    return report


def _tidy(out: Path, report: PrepareReport) -> None:
    """Remove what was needed while the shards were made, and shards of more entries than there are now."""
    strays = {tar.name for tar in out.glob("[0-9]*.tar")} - set(report.shards)
    _remove(out, (".[0-9]*.part", *strays, *(f"{name}.idx" for name in strays), _MARKER))


def _part(path: Path) -> ShardReport:
    part = load_part(path)
    if part is None:
        raise DataError(f"{path}: was removed or damaged after it was written; the same command makes it again")
    return part


def _lock(out: Path, marker: Path) -> FileLock:
    try:
        return lock_file(marker)
    except LockRemovedError as error:
        raise DataError(
            f"{out}: another process has just finished preparing into this folder; start again to use its shards"
        ) from error
    except LockedError as error:
        raise DataError(f"{out}: another process is preparing into this folder; let it finish") from error


def _take_over(out: Path, marker: Path, settings: dict[str, Any]) -> None:
    """Keep what was made with the same settings, and remove other unfinished work.

    Raises:
        DataError: shards of other settings are finished; they are not replaced without asking.
    """
    try:
        before = json.loads(marker.read_bytes())
    except ValueError:  # just begun
        before = None
    if before != settings:
        if before is not None and any(out.glob(".[0-9]*.part")):
            _check_settings(out, before, settings)
        _remove(out, _MADE)
        # In place, since the lock is on this very file; a torn marker reads as work that has just begun.
        marker.write_text(json.dumps(settings), encoding="utf-8")
        sync(marker)


def _check_settings(out: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    if before != settings:
        differing = fingerprint_differences(before, settings)
        raise DataError(
            f"{out}: holds shards made with other settings ({', '.join(differing)}); remove it or choose another folder"
        )


def _remove(out: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
