"""HTTP connections that cannot block a server: headers must arrive in time, and their number is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygptv_ds.apps.serve.api_errors import RequestError

HEADER_SECONDS = 15.0
MAX_CONNECTIONS = 400  # well below the usual limit of 1,024 open files


class BoundedConnection(H11Protocol):
    """A connection of uvicorn's that is closed if it stays without a complete request.

    uvicorn's own limits do not suffice: it waits forever for the first request of a connection, and answers everybody
    with 503 as long as `limit_concurrency` connections are open, idle ones included.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(_too_many_connections())
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

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Start the time for the next request, unless it runs already or a request is being answered."""
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _too_many_connections() -> bytes:
    response: Any = RequestError("too many connections: try again later", status=429, code="queue_full").response()
    head = [b"HTTP/1.1 429 Too Many Requests", b"connection: close"]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", response.body])
