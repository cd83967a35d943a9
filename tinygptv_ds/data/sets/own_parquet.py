"""Parquet files of a user, as Hugging Face publishes datasets; reading them needs pyarrow."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import Row
from tinygptv_ds.errors import DataError

_BATCH = 32  # rows in memory at a time, images included


def read_parquet(file: Path) -> tuple[Iterator[Row], int]:
    """Return the rows of a parquet file, each a dict, and their number.

    Raises DataError if pyarrow is not installed, or if the file is damaged.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{file}: parquet files are read with pyarrow, which is not installed: pip install 'tinygptv_ds[parquet]', "
            f"in a clone: pip install -r requirements-parquet.txt"
        ) from error
    try:
        opened = parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: is a damaged parquet file, or cut short: {error}") from error

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in opened.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    yield Row(f"{file.name}: row {number}", value)
                    number += 1
        except (ArrowException, OSError) as error:
            raise DataError(f"{file}: is damaged after row {number}: {error}") from error

    return rows(), opened.metadata.num_rows
