"""A queue of generations that one thread runs one at a time; a client that disconnects ends its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._places: set[Place] = set()

    @property
    def in_hand(self) -> int:
        """The number of requests that are prepared, wait or run."""
        return len(self._places)

    def admit(self) -> Place:
        """Return a place for a request, before any work is done for it; it must be left in the end.

        Raises:
            RequestError: too many requests are in hand.
        """
        if self.in_hand >= self._capacity:
            raise RequestError("the server is busy: try again later", status=429, code="queue_full")
        place = Place(self._thread, self._places.discard)
        self._places.add(place)
        return place

    def close(self) -> None:
        """End all generations."""
        for place in list(self._places):
            place.leave()
        self._thread.shutdown(cancel_futures=True)


class Place:
    """The place of one request in the queue."""

    def __init__(self, thread: ThreadPoolExecutor, vacate: Callable[[Place], None]) -> None:
        self._thread, self._vacate = thread, vacate
        self._stop = Event()
        self._job: Future[None] | None = None

    async def run(self, start: Callable[[], Generator[Any]]) -> AsyncGenerator[Any]:
        """Yield the pieces of a generation; to be called once.

        Args:
            start: called in the thread when its turn has come; its generator is closed when the place is left.
        """
        messages: asyncio.Queue[_Message] = asyncio.Queue()
        send = _Sender(asyncio.get_running_loop(), messages)
        self._job = self._thread.submit(_generate, start, self._stop, send)
        self._job.add_done_callback(lambda _: self._vacate(self))
        while True:
            piece, end = await messages.get()
            if isinstance(end, BaseException):
                raise end
            if end is not None:
                return
            yield piece

    def leave(self) -> None:
        """End the generation, or remove it from the queue. The place is free as soon as nothing runs in it."""
        self._stop.set()
        if self._job is None or self._job.cancel():
            self._vacate(self)


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
