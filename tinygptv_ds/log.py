"""Logging: rank 0 prints to the console and writes the run directory's log file; other ranks only print warnings.

What libraries log, print or warn of while training goes to the log file alone.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOBase
from pathlib import Path

from tqdm import tqdm

from tinygptv_ds.console import CYAN, RED, YELLOW, colored, has_colors
from tinygptv_ds.errors import ConfigError

LOGGER = logging.getLogger("tinygptv_ds")
# What goes to the log file of what libraries log; the first is the logger of Python's warnings.
_LIBRARIES = {"py.warnings": logging.WARNING, "DeepSpeed": logging.INFO, "transformers": logging.WARNING}
_COLORS = {logging.WARNING: YELLOW, logging.ERROR: RED}
# $PYTHONWARNINGS for DeepSpeed's launcher, which has no log file; it reaches the ranks as well, which undo it.
QUIET = "ignore::FutureWarning,ignore::UserWarning"
_HELD = 10_000  # records that are kept until there is a log file


class _ConsoleFormatter(logging.Formatter):
    """Adds colors where the console shows them: to a whole warning, or to a message's `head`."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not has_colors(sys.stdout):
            return text
        if record.levelno in _COLORS:
            return colored(text, _COLORS[record.levelno])
        head: str = getattr(record, "head", "")
        return text.replace(head, colored(head, getattr(record, "color", CYAN)), 1)


class _FileFormatter(logging.Formatter):
    """Puts what a library logs into one line, with the library's name."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == LOGGER.name:
            return super().format(record)
        text = " ".join(record.getMessage().split())
        return super().format(logging.makeLogRecord({**vars(record), "msg": f"[{record.name}] {text}", "args": ()}))


class _Held(logging.Handler):
    """Keeps records until there is a handler for them; without one it passes nothing on."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[logging.LogRecord] = deque(maxlen=_HELD)
        self._released = False
        self._target: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if not self._released:
            self._records.append(record)
        elif self._target is not None:
            self._target.handle(record)

    def pass_on(self, target: logging.Handler | None) -> None:
        """Give a handler what is kept and all that comes; None: drop it."""
        self._released, self._target = True, target
        while self._records:
            self.emit(self._records.popleft())


class _ConsoleHandler(logging.Handler):
    """A console handler that writes above a progress bar, and discards the output once it cannot be written.

    With several nodes the launcher's ssh connections carry the output. They are closed before a stopped run has saved,
    which it must do all the same.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the reader of a pipe has ended, or the disk of a file is full
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
    """Log to the console (rank 0 everything, other ranks warnings) and, on rank 0, to `log_file`.

    What `hold_library_output` has kept goes to the log file, on other ranks nowhere.

    Raises:
        ConfigError: the file cannot be written.
    """
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
    console = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ConsoleFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    LOGGER.addHandler(console)
    file = None
    if rank == 0 and log_file is not None:
        try:
            file = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"{log_file} cannot be written ({error.strerror}); make room, or move it away") from None
        file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)
    for library in map(logging.getLogger, _LIBRARIES):
        for handler in library.handlers:
            if isinstance(handler, _Held):
                handler.pass_on(file)


def log_with_head(head: str, text: str, color: str = CYAN) -> None:
    """Log a line whose beginning has a color on a terminal."""
    LOGGER.info("%s%s", head, text, extra={"head": head, "color": color})


def note(message: str) -> None:
    """Write a message to the log file alone, not to the console."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, message, (), None))


def hold_library_output() -> None:
    """Keep what libraries log and warn of until there is a log file for it; only their errors are printed.

    Call it before libraries are imported, and again afterwards, because some set up handlers of their own then.
    """
    if os.environ.get("PYTHONWARNINGS") == QUIET:
        del os.environ["PYTHONWARNINGS"]
        for category in (FutureWarning, UserWarning):
            warnings.simplefilter("default", category)
    logging.captureWarnings(True)
    for name, level in _LIBRARIES.items():
        library = logging.getLogger(name)
        held = next((handler for handler in library.handlers if isinstance(handler, _Held)), _Held())
        errors = _ConsoleHandler(logging.ERROR)
        errors.setFormatter(_ConsoleFormatter(f"{name}: %(message)s"))
        library.handlers = [held, errors]
        library.propagate = False
        library.setLevel(level)


@contextmanager
def held_prints() -> Iterator[None]:
    """Treat what libraries print meanwhile as what they log."""
    with redirect_stdout(_Prints()):
        yield


class _Prints(TextIOBase):
    """A stream whose lines are logged as DeepSpeed's."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("DeepSpeed").info(line)
        return len(text)
