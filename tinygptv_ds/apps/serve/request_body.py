"""The bodies of requests: each bounded in size and time, and all that are arriving bounded together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from tinygptv_ds.apps.serve.api_errors import RequestError

_SECONDS = 60  # for a body to arrive


class BodyBudget:
    """Receives bodies, of which each and all that are arriving at a time are bounded.

    Args:
        each: bytes of one body.
        total: bytes of all that are held.
    """

    def __init__(self, each: int, total: int) -> None:
        self._each, self._left = each, total

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """Receive a body, which counts until the context ends.

        Raises:
            RequestError: it is not JSON by its type, too large or too slow, or others take all the memory.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send without permission (CORS)
            raise RequestError(f"the body must be application/json, not {kind or 'of no type'}", status=415)
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise RequestError(f"a body in {encoding} is not read: send it without Content-Encoding", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(_SECONDS):
                self._check(int(request.headers.get("content-length", "0")))
                async for block in request.stream():
                    body += block
                    self._left -= len(block)
                    self._check(len(body))
            yield bytes(body)
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {_SECONDS} s", status=408) from None
        finally:
            self._left += len(body)

    def _check(self, size: int) -> None:
        if size > self._each:
            raise RequestError(f"the body is larger than {self._each:,} bytes", status=413, code="request_too_large")
        if self._left < 0:
            raise RequestError("the server is busy: try again later", status=429, code="queue_full")
