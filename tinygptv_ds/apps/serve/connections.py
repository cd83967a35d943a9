"""HTTP connections that cannot block a server: who sends or reads too slowly loses his, and their number is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygptv_ds.apps.serve.api_errors import RequestError

HEADER_SECONDS = 15.0
WRITE_SECONDS = 30.0  # for a client to read on, when all buffers are full
MAX_CONNECTIONS = 400  # well below the usual limit of 1,024 open files


class BoundedConnection(H11Protocol):
    """A connection of uvicorn's that is closed if it stays without a complete request.

    uvicorn's own limits do not suffice: it waits forever for the first request of a connection, and answers everybody
    with 503 as long as `limit_concurrency` connections are open, idle ones included. It also waits forever for a client
    that does not read its answer, and refuses what is not HTTP with an empty text.
    """

    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            error = RequestError("too many connections: try again later", status=429, code="queue_full")
            transport.write(_raw_response(error, "429 Too Many Requests"))
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Process incoming bytes; those of an incomplete header do not extend its time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request of the connection."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or has headers of more than 64 KB."""
        reason = f"the request is not valid HTTP, or its headers are longer than 64 KB ({msg})"
        self.transport.write(_raw_response(RequestError(reason, code="invalid_http"), "400 Bad Request"))
        self.transport.close()

    def pause_writing(self) -> None:
        """Start the time for a client to read on."""
        super().pause_writing()
        self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._stop_write_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._unwatch()
        self._stop_write_deadline()

    def _stop_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _watch(self) -> None:
        """Start the time for the next request, unless it runs already or a request is being answered."""
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _raw_response(error: RequestError, status: str) -> bytes:
    response: Any = error.response()
    head = [f"HTTP/1.1 {status}".encode(), b"connection: close"]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", response.body])
