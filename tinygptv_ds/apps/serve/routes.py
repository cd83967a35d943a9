"""The server's routes: `/v1/chat/completions`, `/v1/models`, `/metrics` and `/health`, in the form of OpenAI's API.

A request passes, in this order: key and host, the sizes of its body and messages, admission to the queue, its images,
its prompt. What is refused has cost little, and a client that disconnects leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.batch_loop import BatchLoop, Finish, Piece
from tinygptv_ds.apps.serve.completion import prepare
from tinygptv_ds.apps.serve.generation_queue import GenerationQueue, Place
from tinygptv_ds.apps.serve.metrics import CONTENT_TYPE, Gauge, ServerMetrics
from tinygptv_ds.apps.serve.reply import EventStream, Reply
from tinygptv_ds.apps.serve.request_body import BodyBudget
from tinygptv_ds.apps.serve.request_images import ImageLimits, load_images
from tinygptv_ds.apps.serve.request_schema import ChatRequest, TextLimits, parse_request
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.logprobs import TokenBytes
from tinygptv_ds.generate.settings import Generation

log = logging.getLogger(__name__)
_BODIES_AT_ONCE = 4
_DECODERS = 2
_PATHS = ("POST /v1/chat/completions", "GET /v1/models", "GET /metrics", "GET /health")
_Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body_bytes: size of the body, including images in `data:` URLs; all bodies that are arriving may together be
            `_BODIES_AT_ONCE` times as large.
        new_tokens: length of an answer.
        waiting: number of requests that may wait while others are answered.
        images: number and size of the images.
        batch: number of requests that are answered at a time.
    """

    body_bytes: int
    new_tokens: int
    waiting: int
    images: ImageLimits
    batch: int = 8


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        api_key: required for `/v1/...` and `/metrics`, unless it is None.
        hosts: accepted names of the server in the `Host` header, without port; empty: any. A server on the loopback
            interface needs them against DNS rebinding, by which a web page reaches it under a name of its own.
        origins: the web pages whose scripts may use the server, as in `Access-Control-Allow-Origin`.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


def build_app(
    answerer: Answerer, defaults: Generation, limits: Limits, access: Access = Access(), *, strict: bool = False
) -> Starlette:
    """Build the application.

    Args:
        answerer: the model.
        defaults: settings of generation that a request leaves out.
        limits: limits of a request.
        access: who may use the server.
        strict: whether conversations in another form than the training's are refused instead of rearranged.
    """
    endpoints = Endpoints(answerer, defaults, limits, strict)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        endpoints.close()

    def guarded(endpoint: _Endpoint, *, needs_key: bool = True) -> _Endpoint:
        return _guarded(endpoint, access.hosts, access.api_key if needs_key else None)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(endpoints.chat), methods=["POST"]),
            Route("/v1/models", guarded(endpoints.models)),
            Route("/v1/models/{name:path}", guarded(endpoints.model)),
            Route("/metrics", guarded(endpoints.metrics)),
            Route("/health", guarded(endpoints.health, needs_key=False)),
        ],
        middleware=[*([_cors(access.origins)] if access.origins else []), Middleware(_PlainRequests)],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),  # no client reads it
        },
        lifespan=lifespan,
    )
    app.state.endpoints = endpoints
    return app


class Endpoints:
    """The endpoints of one model. Arguments as of `build_app`.

    Attributes:
        draining: set when no further requests are to be answered.
    """

    def __init__(self, answerer: Answerer, defaults: Generation, limits: Limits, strict: bool) -> None:
        self._answerer, self._defaults, self._limits, self._strict = answerer, defaults, limits, strict
        self.draining = False
        self._metrics = ServerMetrics()
        self._loop = BatchLoop(answerer.decoder(), limits.batch, answerer.context, self._metrics)
        self._queue = GenerationQueue(self._loop, limits.batch + limits.waiting)
        self._bodies = BodyBudget(limits.body_bytes, _BODIES_AT_ONCE * limits.body_bytes)
        self._decoders = ThreadPoolExecutor(_DECODERS, "image")
        self._texts = TextLimits(answerer.context, answerer.max_characters)
        self._token_bytes = TokenBytes(answerer.processor.tokenizer)
        self._created = int(time.time())

    @property
    def in_hand(self) -> int:
        """The number of requests that are prepared, wait or are answered."""
        return self._queue.in_hand

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        began = time.monotonic()
        code = "500"
        try:
            response = await self._answer(request, began)
            code = str(response.status_code)
            return response
        except RequestError as error:
            code = str(error.status)
            self._metrics.refused.add(1, error.code or "invalid_request")
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            code = "499"
            raise
        finally:
            self._metrics.requests.add(1, code)

    async def _answer(self, request: Request, began: float) -> Response:
        if self.draining:
            raise RequestError(
                "the server is shutting down; send the request to another one", status=503, code="draining"
            )
        async with self._bodies.receive(request) as body:
            parsed = await asyncio.to_thread(parse_request, body, self._texts, strict=self._strict)
        if parsed.model != self._answerer.name:
            message = f"the model {parsed.model!r} is not here; this server has {self._answerer.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        place = self._queue.admit()
        try:
            return await self._reply(request, parsed, place, began)
        except BaseException:
            place.leave()
            raise

    async def _reply(self, request: Request, parsed: ChatRequest, place: Place, began: float) -> Response:
        answerer, limits = self._answerer, self._limits
        loading = load_images(parsed, answerer.processor.image_size, limits.images, self._decoders)
        images = await _unless_disconnected(request, loading)
        row = await asyncio.to_thread(
            prepare, answerer, parsed, images, self._defaults, limits.new_tokens, strict=self._strict
        )
        pieces = self._timed(place.run(row), began)
        reply = Reply(answerer.name, len(row.prompt_ids), self._token_bytes if parsed.logprobs else None)
        if not parsed.stream:
            whole = JSONResponse(await _unless_disconnected(request, reply.whole(pieces)))
            place.leave()
            return whole
        first = await _unless_disconnected(request, anext(pieces))  # an error before the first piece has its own status
        events = reply.events(first, pieces, usage=parsed.stream_options.include_usage)
        return EventStream(events, place)

    async def _timed(self, pieces: AsyncGenerator[Piece | Finish], began: float) -> AsyncGenerator[Piece | Finish]:
        """Yield the pieces of an answer and measure when they come."""
        waits = True
        async with aclosing(pieces):
            async for piece in pieces:
                if waits:
                    self._metrics.first_token.observe(time.monotonic() - began)
                    waits = False
                if isinstance(piece, Finish):
                    self._metrics.duration.observe(time.monotonic() - began)
                yield piece

    async def models(self, request: Request) -> Response:
        """List the only model."""
        return JSONResponse({"object": "list", "data": [_model(self._answerer.name, self._created)]})

    async def model(self, request: Request) -> Response:
        """Describe a model."""
        name = self._answerer.name
        if request.path_params["name"] != name:
            raise RequestError(f"the only model here is {name!r}", status=404, code="model_not_found")
        return JSONResponse(_model(name, self._created))

    async def metrics(self, request: Request) -> Response:
        """Report the metrics."""
        gauges = (
            Gauge(
                "tinygptv_requests_in_flight", "Requests that are prepared, wait or are answered.", lambda: self.in_hand
            ),
            Gauge(
                "tinygptv_requests_waiting", "Requests that wait for a place in the batch.", lambda: self._loop.waiting
            ),
            Gauge("tinygptv_requests_running", "Requests in the batch.", lambda: self._loop.running),
        )
        return PlainTextResponse(self._metrics.text(*gauges), headers={"Content-Type": CONTENT_TYPE})

    async def health(self, request: Request) -> Response:
        """Report whether requests are answered, and how many are in hand."""
        status = "draining" if self.draining else "ready"
        body = {"status": status, "model": self._answerer.name, "in_hand": self.in_hand}
        return JSONResponse(body, 503 if self.draining else 200)

    def close(self) -> None:
        """End all work."""
        self._queue.close()
        self._decoders.shutdown(cancel_futures=True)


class _PlainRequests:
    """Makes requests unambiguous.

    A slash at the end of a path is left out; a redirection would lead from a proxy's https to http. A body of two
    lengths is refused, since a proxy that believes the other one would take its rest for another client's request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http":
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                error = RequestError("Content-Length and Transfer-Encoding exclude each other", code="invalid_http")
                await error.response({"Connection": "close"})(scope, receive, send)
                return
            scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
        await self._app(scope, receive, send)


def _guarded(endpoint: _Endpoint, hosts: frozenset[str], api_key: str | None) -> _Endpoint:
    """Return the endpoint behind the checks of host and key, with its failures in the API's form."""

    async def check(request: Request) -> Response:
        _check_host(request, hosts)
        if api_key is not None and not _has_key(request, api_key):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key")
        try:
            return await endpoint(request)
        except (RequestError, ClientDisconnect):
            raise
        except Exception as error:  # a bug: answered here, so that the connection stays open
            log.exception("%s %s", request.method, request.url.path)
            message = f"the server failed: {type(error).__name__}"
            raise RequestError(message, status=500, code="internal_error") from None

    return check


async def _unless_disconnected(request: Request, work: Awaitable[_Result]) -> _Result:
    """Return the result of `work`, which is canceled if the client disconnects.

    Raises:
        ClientDisconnect: it has disconnected.
    """
    result, disconnection = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait([result, disconnection], return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        result.cancel()
        disconnection.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_host(request: Request, hosts: frozenset[str]) -> None:
    """Refuse a request for a host that the server is not."""
    given = request.headers.get("host", "")
    name = given.rpartition(":")[0] if ":" in given.rpartition("]")[2] else given
    if hosts and name.lower() not in hosts:
        raise RequestError(
            f"the Host header names {given!r}; this server is {' or '.join(sorted(hosts))} (see serve --allowed-host)",
            status=403,
            code="host_not_allowed",
        )


def _cors(origins: tuple[str, ...]) -> Middleware:
    return Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
    )


def _has_key(request: Request, api_key: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tinygptv_ds"}


def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with a wrong method."""
    assert isinstance(error, HTTPException)
    message, code = f"{request.method} {request.url.path}: {error.detail}", None
    if error.status_code == 404:
        message, code = f"{message}; this server has {', '.join(_PATHS)}", "unknown_url"
    return RequestError(message, status=error.status_code, code=code).response(error.headers)
