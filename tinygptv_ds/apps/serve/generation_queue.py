"""A queue of generations that one thread runs one at a time; a client that disconnects ends its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from threading import Event
from typing import Any, TypeAlias

from tinygptv_ds.apps.serve.api_errors import RequestError

_Message: TypeAlias = tuple[Any, BaseException | bool | None]  # (piece, end); `end` is None while more pieces follow


class GenerationQueue:
    """Runs generations in the order of their requests.

    Args:
        max_waiting: how many may wait while one runs; further ones are refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self._capacity = max_waiting + 1
        self._thread = ThreadPoolExecutor(1, "generation")
        self._stops: set[Event] = set()  # one for each generation that waits or runs

    @property
    def in_hand(self) -> int:
        """The number of generations that wait or run."""
        return len(self._stops)

    async def run(self, start: Callable[[], Generator[Any]]) -> AsyncGenerator[Any]:
        """Yield the pieces of a generation.

        Closing this generator closes the one of `start`, or removes it from the queue.

        Args:
            start: called in the thread when its turn has come.

        Raises:
            RequestError: too many generations wait.
        """
        if self.in_hand >= self._capacity:
            raise RequestError("the server is busy: try again later", status=429, code="queue_full")
        stop = Event()
        messages: asyncio.Queue[_Message] = asyncio.Queue()
        self._stops.add(stop)
        job = self._thread.submit(_generate, start, stop, _Sender(asyncio.get_running_loop(), messages))
        job.add_done_callback(lambda _: self._stops.discard(stop))
        try:
            while True:
                piece, end = await messages.get()
                if end is not None:
                    break
                yield piece
            if isinstance(end, BaseException):
                raise end
        finally:
            stop.set()
            job.cancel()

    def close(self) -> None:
        """End all generations."""
        for stop in list(self._stops):
            stop.set()
        self._thread.shutdown(cancel_futures=True)


class _Sender:
    """Puts messages into a queue of the event loop, from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[_Message]) -> None:
        self._loop, self._queue = loop, queue

    def __call__(self, piece: Any, end: BaseException | bool | None = None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits for the message
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (piece, end))


def _generate(start: Callable[[], Generator[Any]], stop: Event, send: _Sender) -> None:
    try:
        with closing(start()) as pieces:
            for piece in pieces:
                if stop.is_set():
                    return
                send(piece)
        send(None, end=True)
    except BaseException as error:  # raised again in `run`
        send(None, end=error)
