"""Logging: rank 0 talks on the console and keeps everything in the run directory's log; the others only warn."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

LOGGER = logging.getLogger("tinygptv_ds")


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar instead of through it, and falls silent when nobody is there to read.

    With several nodes the launcher's ssh connections carry the output; a run that is told to stop must save although
    they are closed first.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up_logging(rank: int = 0, log_file: Path | None = None) -> None:
    """Send the program's log to the console (rank 0: all, others: warnings) and, on rank 0, to `log_file`."""
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
    console = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.addHandler(console)
    if rank == 0 and log_file is not None:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)


def note(message: str) -> None:
    """To the log file alone, not to the console."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, message, (), None))
