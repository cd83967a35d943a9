"""The rows of a user's annotation files: JSON, JSON lines, tables or parquet, recognized by their content."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import Row
from tinygptv_ds.data.sets.own_json import count_lines, read_json
from tinygptv_ds.data.sets.own_parquet import read_parquet
from tinygptv_ds.data.sets.own_tables import read_table
from tinygptv_ds.errors import DataError
from tinygptv_ds.git_lfs import is_lfs_pointer

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_rows(file: Path) -> tuple[Iterator[Row], int]:
    """Return the rows of an annotation file of any kind, which are objects, and their number.

    Raises DataError if it is none of the kinds, with what is wrong and in which line.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(4096)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if start.startswith(b"PAR1"):
        return read_parquet(file)
    if not start.strip():
        raise DataError(f"{file}: is empty")
    if is_lfs_pointer(start):
        raise DataError(f"{file}: is a Git LFS pointer, not the file itself; fetch that with: git lfs pull")
    if start.startswith(_UTF_16):
        raise DataError(f"{file}: is UTF-16; save it as UTF-8")
    if file.suffix.lower() in (".csv", ".tsv"):
        return read_table(file), count_lines(file) - 1
    return read_json(file)
