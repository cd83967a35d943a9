"""TensorBoard's writer for a run that must survive a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER


class _Guarded:
    """TensorBoard's event writer; once it fails, which it does in a thread of its own, events are dropped.

    Args:
        writer: TensorBoard's own.
        folder: for the message.
    """

    def __init__(self, writer: Any, folder: Path) -> None:
        self._writer, self._folder = writer, folder
        self._failed = False

    def add_event(self, event: Any) -> None:
        """Write an event, unless writing has failed before."""
        self._try(lambda: self._writer.add_event(event))

    def get_logdir(self) -> str:
        """Return the folder of the events."""
        return str(self._folder)

    def flush(self) -> None:
        """Write what is waiting."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """Write what is waiting, and close the file."""
        self._try(self._writer.close)

    def _try(self, call: Any) -> None:
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
        purge_step: TensorBoard ignores what earlier files contain from this step on.

    Raises:
        ConfigError: the folder cannot be made, or written to at all.
    """
    try:
        board = SummaryWriter(folder, purge_step=purge_step)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, or move it away") from None
    writer: Any = board.file_writer  # torch annotates it as None
    writer.event_writer = _Guarded(writer.event_writer, folder)
    return board
