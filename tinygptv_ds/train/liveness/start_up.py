"""The end of a launcher while its ranks start up: they have nothing to save, and end at once. No torch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import TracebackType

from tinygptv_ds.log import note
from tinygptv_ds.processes import own_rank
from tinygptv_ds.train.liveness.launchers import LOST, Launchers

_EVERY = 1.0  # seconds
_MESSAGE = (
    "the launcher has ended while the run was starting up; nothing has been trained. Start the same command again"
)


def end_without_launcher(launchers: Launchers) -> None:
    """End this process if one of its launchers has ended; rank 0 prints why, if anything still reads it."""
    if not launchers.gone():
        return
    if own_rank() == 0:
        note(_MESSAGE)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            os.write(2, f"error: {_MESSAGE}\n".encode())
    os._exit(LOST)


class StartUp:
    """A thread that calls `end_without_launcher` once a second, also while this rank loads or waits for the others.

    A context manager; from `over` on a launcher's end is a request to save and stop (`StopSignals`).
    """

    def __init__(self, launchers: Launchers) -> None:
        self._launchers = launchers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="start-up", daemon=True)

    def __enter__(self) -> StartUp:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over()

    def over(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            end_without_launcher(self._launchers)
            if self._over.wait(_EVERY):
                return
