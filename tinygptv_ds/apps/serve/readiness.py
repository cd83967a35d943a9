"""A server that answers from its first moment to its last: 503 while the model is loaded, and while it drains."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from threading import Thread
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.connections import BoundedConnection

_DRAINING_SECONDS = 30.0  # for answers that have begun or wait
_LOADING = RequestError("the model is being loaded: try again later", status=503, code="loading")


class ReadinessServer(uvicorn.Server):
    """A server of an application that is built while it runs already.

    SIGTERM first drains it: further requests are refused with 503, those in hand are answered for up to 30 s. Then it
    shuts down, as at once at a second SIGTERM or SIGINT.

    Args:
        build: loads the model and returns the application; runs in a thread. Its error ends the server.
    """

    def __init__(self, build: Callable[[], Starlette]) -> None:
        super().__init__(
            uvicorn.Config(
                self._serve_request,
                interface="asgi3",
                http=BoundedConnection,
                log_level="warning",
                timeout_graceful_shutdown=int(_DRAINING_SECONDS),
                server_header=False,
            )
        )
        self.error: BaseException | None = None
        self._build = build
        self._app: Starlette | None = None
        self._drained_by: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, then begin to load the model."""
        await super().startup(sockets)
        Thread(target=self._load, name="loading", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """End when the server has drained."""
        if self._drained_by is not None and (not self._in_hand() or time.monotonic() > self._drained_by):
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first SIGTERM."""
        if sig != signal.SIGTERM or self._drained_by is not None:
            super().handle_exit(sig, frame)
            return
        self._drained_by = time.monotonic() + _DRAINING_SECONDS
        if self._app is not None:
            self._app.state.endpoints.draining = True

    def _load(self) -> None:
        try:
            self._app = self._build()
        except BaseException as error:  # raised again where the server is run
            self.error = error
            self.should_exit = True

    def _in_hand(self) -> int:
        return 0 if self._app is None else self._app.state.endpoints.in_hand

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, as soon as there is one."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["path"] == "/health":
            await JSONResponse({"status": "loading"}, 503, {"Retry-After": "10"})(scope, receive, send)
        else:
            await _LOADING.response()(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        if self._app is not None:
            self._app.state.endpoints.close()
        await send({"type": "lifespan.shutdown.complete"})
