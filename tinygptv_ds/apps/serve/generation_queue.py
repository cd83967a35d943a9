"""Admission of requests, and their way through the batch; a client that disconnects leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.batch_loop import BatchLoop, Finish, Job, Message, Piece
from tinygptv_ds.generate.row import Row


class GenerationQueue:
    """The requests that are in hand, of which no more are admitted than can be answered or may wait.

    Args:
        loop: generates the answers.
        capacity: how many may be in hand.
    """

    def __init__(self, loop: BatchLoop, capacity: int) -> None:
        self._loop, self._capacity = loop, capacity
        self._places: set[Place] = set()

    @property
    def in_hand(self) -> int:
        """The number of requests that are prepared, wait or are answered."""
        return len(self._places)

    def admit(self) -> Place:
        """Return a place for a request, before any work is done for it; it must be left in the end.

        Raises:
            RequestError: too many requests are in hand.
        """
        if self.in_hand >= self._capacity:
            raise RequestError("the server is busy: try again later", status=429, code="queue_full")
        place = Place(self._loop, self._places.discard)
        self._places.add(place)
        return place

    def close(self) -> None:
        """End all answers."""
        self._loop.close()


class Place:
    """The place of one request in the queue."""

    def __init__(self, loop: BatchLoop, vacate: Callable[[Place], None]) -> None:
        self._loop, self._vacate = loop, vacate
        self._job: Job | None = None

    async def run(self, row: Row) -> AsyncGenerator[Piece | Finish]:
        """Yield the pieces of an answer, then its end; to be called once."""
        messages: asyncio.Queue[Message] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def send(message: Message) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so no client waits for the message
                here.call_soon_threadsafe(messages.put_nowait, message)

        self._job = Job(row, send, lambda: self._vacate(self))
        self._loop.submit(self._job)
        while True:
            message = await messages.get()
            if isinstance(message, BaseException):
                raise message
            yield message
            if isinstance(message, Finish):
                return

    def leave(self) -> None:
        """End the answer, or remove it from the queue. The place is free as soon as nothing is done for it."""
        if self._job is None or self._loop.discard(self._job):
            self._vacate(self)
        else:
            self._job.row.closed = True
