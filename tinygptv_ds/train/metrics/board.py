"""TensorBoard's writer for a run that must survive a full disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER

FLUSH_SECONDS = 120.0  # as SummaryWriter's own default
_PROBE = 8192  # bytes; the first records of a file take less


class _Guarded:
    """TensorBoard's record writer, which a thread of its own uses; once it fails, records are dropped.

    Args:
        writer: TensorBoard's own.
        folder: for the message.
    """

    def __init__(self, writer: Any, folder: Path) -> None:
        self._writer, self._folder = writer, folder
        self._failed = False
        self._flushed = time.monotonic()

    def write(self, data: bytes) -> None:
        """Write a record, unless writing has failed before."""
        self._try(lambda: self._writer.write(data))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # TensorBoard's thread goes by the time of the day
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        self._flushed = time.monotonic()
        self._try(self._writer.flush)

    def close(self) -> None:
        """Write what is waiting, and close the file."""
        self._try(self._writer.close)

    def _try(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except OSError as error:
            self._failed = True
            LOGGER.warning("%s cannot be written (%s); training continues without it", self._folder, error.strerror)


def open_board(folder: Path, purge_step: int | None) -> SummaryWriter:
    """Open TensorBoard's writer in a folder.

    Args:
        folder: gets a file of events.
        purge_step: TensorBoard shall forget what earlier files hold from this step on.

    Raises:
        ConfigError: the folder cannot be made, or written to at all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # TensorBoard's thread would end in a traceback
            probe.write(bytes(_PROBE))
        board = SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, or move it away") from None
    # Errors are caught where the thread meets them. Remove when tensorboard no longer prints them as tracebacks.
    writer: Any = board.file_writer  # torch annotates it as None
    queue = writer.event_writer._async_writer
    queue._writer = queue._worker._record_writer = _Guarded(queue._writer, folder)
    return board
