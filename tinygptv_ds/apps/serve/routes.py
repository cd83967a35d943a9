"""The server's routes: `/v1/chat/completions`, `/v1/models` and `/health`, in the form of OpenAI's API.

A request passes, in this order: key and host, the sizes of its body and messages, admission to the queue, its images,
its prompt. What is refused has cost little, and a client that disconnects leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.completion import Finish, prepare, stream_answer
from tinygptv_ds.apps.serve.generation_queue import GenerationQueue, Place
from tinygptv_ds.apps.serve.request_images import ImageLimits, load_images
from tinygptv_ds.apps.serve.request_schema import ChatRequest, TextLimits, parse_request
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.settings import Generation

log = logging.getLogger(__name__)
_BODY_SECONDS = 60  # for a request's body to arrive
_BODIES_AT_ONCE = 4
_DECODERS = 2
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body_bytes: size of the body, including images in `data:` URLs; all bodies that are arriving may together be
            `_BODIES_AT_ONCE` times as large.
        new_tokens: length of an answer.
        waiting: number of requests that may wait while one is answered.
        images: number and size of the images.
    """

    body_bytes: int
    new_tokens: int
    waiting: int
    images: ImageLimits


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        api_key: required for `/v1/...`, unless it is None.
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
    queue = GenerationQueue(limits.waiting)
    created = int(time.time())
    bodies = _BodyBudget(limits.body_bytes, _BODIES_AT_ONCE * limits.body_bytes)
    decoders = ThreadPoolExecutor(_DECODERS, "image")
    texts = TextLimits(answerer.context, answerer.max_characters)

    async def chat(request: Request) -> Response:
        async with bodies.receive(request) as body:
            parsed = await asyncio.to_thread(parse_request, body, texts, strict=strict)
        if parsed.model != answerer.name:
            message = f"the model {parsed.model!r} is not here; this server has {answerer.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        place = queue.admit()
        try:
            return await reply(request, parsed, place)
        except BaseException:
            place.leave()
            raise

    async def reply(request: Request, parsed: ChatRequest, place: Place) -> Response:
        loading = load_images(parsed, answerer.processor.image_size, limits.images, decoders)
        images = await _unless_disconnected(request, loading)
        prepared = await asyncio.to_thread(
            prepare, answerer, parsed, images, defaults, limits.new_tokens, strict=strict
        )
        pieces = place.run(lambda: stream_answer(answerer, prepared))
        answer = _Reply(answerer.name, prepared.prompt_tokens)
        if not parsed.stream:
            whole = JSONResponse(await _unless_disconnected(request, answer.whole(pieces)))
            place.leave()
            return whole
        first = await _unless_disconnected(request, anext(pieces))  # an error before the first piece has its own status
        events = answer.events(first, pieces, usage=parsed.stream_options.include_usage)
        return _EventStream(events, place)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(answerer.name, created)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != answerer.name:
            raise RequestError(f"the only model here is {answerer.name!r}", status=404, code="model_not_found")
        return JSONResponse(_model(answerer.name, created))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": answerer.name, "in_hand": queue.in_hand})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        queue.close()
        decoders.shutdown(cancel_futures=True)

    def guarded(
        endpoint: Callable[[Request], Awaitable[Response]], *, api_key: str | None = access.api_key
    ) -> Callable[[Request], Awaitable[Response]]:
        async def check(request: Request) -> Response:
            _check_host(request, access.hosts)
            if api_key is not None and not _has_key(request, api_key):
                raise RequestError(
                    "a valid API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key"
                )
            try:
                return await endpoint(request)
            except (RequestError, ClientDisconnect):
                raise
            except Exception as error:  # a bug: answered here, so that the connection stays open
                log.exception("%s %s", request.method, request.url.path)
                message = f"the server failed: {type(error).__name__}"
                raise RequestError(message, status=500, code="internal_error") from None

        return check

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(model)),
            Route("/health", guarded(health, api_key=None)),
        ],
        middleware=[_cors(access.origins)] if access.origins else [],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=499),  # nobody reads it
        },
        lifespan=lifespan,
    )


@dataclass(frozen=True)
class _Reply:
    """An answer in the form of OpenAI's API, whole or as events."""

    model: str
    prompt_tokens: int

    async def whole(self, pieces: AsyncGenerator[str | Finish]) -> dict[str, Any]:
        """Return a `chat.completion`."""
        text: list[str] = []
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Finish):
                    message = {"role": "assistant", "content": "".join(text), "refusal": None}
                    choice = {"message": message, "logprobs": None, "finish_reason": piece.reason}
                    return self._object("chat.completion", choice) | {"usage": self._usage(piece)}
                text.append(piece)
        raise RuntimeError("the answer has no end")

    async def events(
        self, first: str | Finish, pieces: AsyncGenerator[str | Finish], *, usage: bool
    ) -> AsyncGenerator[str]:
        """Yield `chat.completion.chunk`s as server-sent events."""
        constant = self._object("chat.completion.chunk", {})

        def event(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _event(constant | {"choices": [choice]} | ({"usage": None} if usage else {}))

        yield event({"role": "assistant", "content": ""})
        async with aclosing(pieces):
            try:
                async for piece in _chain(first, pieces):
                    if isinstance(piece, str):
                        yield event({"content": piece})
                        continue
                    yield event({}, piece.reason)
                    if usage:
                        yield _event(constant | {"choices": [], "usage": self._usage(piece)})
                yield "data: [DONE]\n\n"
            except Exception as error:
                log.exception("an answer broke off")
                yield _event(RequestError(f"the answer broke off: {type(error).__name__}", status=500).body)

    def _object(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": [{"index": 0, **choice}],
        }

    def _usage(self, finish: Finish) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": finish.tokens,
            "total_tokens": self.prompt_tokens + finish.tokens,
        }


class _EventStream(StreamingResponse):
    """A stream of events that leaves the queue as soon as the client disconnects, even before the first event."""

    def __init__(self, events: AsyncGenerator[str], place: Place) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()


async def _chain(first: Any, others: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for other in others:
        yield other


class _BodyBudget:
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
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                self._check(int(request.headers.get("content-length", "0")))
                async for block in request.stream():
                    body += block
                    self._left -= len(block)
                    self._check(len(body))
            yield bytes(body)
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {_BODY_SECONDS} s", status=408) from None
        finally:
            self._left += len(body)

    def _check(self, size: int) -> None:
        if size > self._each:
            raise RequestError(f"the body is larger than {self._each:,} bytes", status=413, code="request_too_large")
        if self._left < 0:
            raise RequestError("the server is busy: try again later", status=429, code="queue_full")


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


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tinygptv_ds"}


def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with a wrong method."""
    assert isinstance(error, HTTPException)
    return RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code).response()
