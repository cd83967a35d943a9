"""One generation at a time in a thread of its own, handed on piece by piece; who no longer listens ends his."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from threading import Event
from typing import Any

from tinygptv_ds.apps.serve.api_errors import Refused


class Worker:
    """Carries out what it is given in the order in which it came.

    Args:
        most_waiting: further ones are refused while so many wait and one is carried out.
    """

    def __init__(self, most_waiting: int) -> None:
        self._room = most_waiting + 1
        self._thread = ThreadPoolExecutor(1, "generation")
        self._stops: set[Event] = set()  # one of each that waits or is carried out

    @property
    def in_hand(self) -> int:
        """How many are carried out or wait for it."""
        return len(self._stops)

    async def run(self, make: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
        """What the iterator that `make` returns gives; `make` is called when its turn comes, in the thread.

        The iterator is closed, and what waits dropped, as soon as this one is closed.

        Raises:
            Refused: too many wait.
        """
        if self.in_hand >= self._room:
            raise Refused("the server is busy: try again later", status=429, code="queue_full")
        stop, arrived = Event(), asyncio.Queue()
        self._stops.add(stop)
        job = self._thread.submit(_work, make, stop, _Sender(asyncio.get_running_loop(), arrived))
        job.add_done_callback(lambda _: self._stops.discard(stop))
        try:
            while True:
                piece, end = await arrived.get()
                if end is not None:
                    break
                yield piece
            if isinstance(end, BaseException):
                raise end
        finally:
            _end(job, stop)

    def close(self) -> None:
        """End everything."""
        for stop in list(self._stops):
            stop.set()
        self._thread.shutdown(cancel_futures=True)


class _Sender:
    """Puts (piece, end) into a queue of the event loop; `end` is None while more is to come."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue) -> None:
        self._loop, self._queue = loop, queue

    def __call__(self, piece: Any, end: BaseException | bool | None = None) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (piece, end))


def _work(make: Callable[[], Iterator[Any]], stop: Event, send: _Sender) -> None:
    try:
        with closing(make()) as pieces:
            for piece in pieces:
                if stop.is_set():
                    return
                send(piece)
        send(None, end=True)
    except BaseException as error:  # raised again where it is awaited
        send(None, end=error)


def _end(job: Future, stop: Event) -> None:
    stop.set()
    job.cancel()
