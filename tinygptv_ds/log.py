"""Logging: rank 0 prints to the console and writes the run directory's log file; other ranks only print warnings."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from tinygptv_ds.errors import ConfigError

LOGGER = logging.getLogger("tinygptv_ds")


class _ConsoleHandler(logging.Handler):
    """A console handler that writes above a progress bar, and discards the output once its reader has ended.

    With several nodes the launcher's ssh connections carry the output. They are closed before a stopped run has saved,
    which it must do all the same.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _LogFile(logging.FileHandler):
    """The log file; on a full disk lines are lost, with one warning, and the run continues."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not self._warned:
            self._warned = True
            LOGGER.warning("%s cannot be written (%s); training continues", self.baseFilename, error.strerror)
        elif not isinstance(error, OSError):
            super().handleError(record)


def set_up_logging(rank: int = 0, log_file: Path | None = None) -> None:
    """Log to the console (rank 0 everything, other ranks warnings) and, on rank 0, to `log_file`."""
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
    console = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.addHandler(console)
    if rank == 0 and log_file is not None:
        try:
            file = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"{log_file} cannot be written ({error.strerror}); make room, or move it away") from None
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)


def note(message: str) -> None:
    """Write a message to the log file alone, not to the console."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, message, (), None))
