"""SIGTSTP, as Ctrl-Z and SLURM's suspension send it: the time until a process continues must not count as silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType


class Suspension:
    """Suspends this process on SIGTSTP, from a thread: the main one may wait for a rank that is suspended already.

    Made and closed by the main thread. Where SIGTSTP is ignored, it stays so.

    Args:
        before: called in the thread just before.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        for end in (self._ours, theirs):
            end.setblocking(False)
        self._handler = signal.getsignal(signal.SIGTSTP)
        self._descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        if self._handler is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, _note)

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Act on the signal from now on, in the thread of an event loop."""
        loop.add_reader(self._ours, self._read)

    def close(self) -> None:
        """Give the signal back. The event loop must have ended."""
        signal.signal(signal.SIGTSTP, self._handler)
        signal.set_wakeup_fd(self._descriptor)
        self._ours.close()
        self._theirs.close()

    def _read(self) -> None:
        """Take the numbers of signals, which Python writes as they arrive, whatever the main thread does."""
        with contextlib.suppress(BlockingIOError):
            if signal.SIGTSTP in self._ours.recv(4096):
                self._before()
                os.kill(os.getpid(), signal.SIGSTOP)  # returns when the process continues


def _note(number: int, frame: FrameType | None) -> None:
    """Keep the signal from its default."""
