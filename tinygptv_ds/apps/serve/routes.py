"""The server's routes: `/v1/chat/completions`, `/v1/models` and `/health`, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.completion import Finish, prepare, stream_answer
from tinygptv_ds.apps.serve.generation_queue import GenerationQueue
from tinygptv_ds.apps.serve.request_images import ImageLimits, load_images
from tinygptv_ds.apps.serve.request_schema import parse_request
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.settings import Generation

log = logging.getLogger(__name__)
_BODY_SECONDS = 60  # for a request's body to arrive
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body_bytes: size of the body, including images in `data:` URLs.
        new_tokens: length of an answer.
        waiting: number of requests that may wait while one is answered.
        images: number and size of the images.
    """

    body_bytes: int
    new_tokens: int
    waiting: int
    images: ImageLimits


def build_app(answerer: Answerer, defaults: Generation, limits: Limits, api_key: str | None = None) -> Starlette:
    """Build the application.

    Args:
        answerer: the model.
        defaults: settings of generation that a request leaves out.
        limits: limits of a request.
        api_key: required for `/v1/...`, unless it is None.
    """
    queue = GenerationQueue(limits.waiting)
    created = int(time.time())

    async def chat(request: Request) -> Response:
        parsed = parse_request(await _body(request, limits.body_bytes))
        if parsed.model != answerer.name:
            message = f"the model {parsed.model!r} is not here; this server has {answerer.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        images = await load_images(parsed, answerer.processor.image_size, limits.images)
        prepared = await asyncio.to_thread(prepare, answerer, parsed, images, defaults, limits.new_tokens)
        pieces = queue.run(lambda: stream_answer(answerer, prepared))
        reply = _Reply(answerer.name, prepared.prompt_tokens)
        if not parsed.stream:
            return JSONResponse(await _unless_disconnected(request, reply.whole(pieces)))
        first = await _unless_disconnected(request, anext(pieces))  # an error before the first piece has its own status
        usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        return _EventStream(reply.events(first, pieces, usage=usage))

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

    def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def check(request: Request) -> Response:
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
            Route("/health", health),
        ],
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
    """A stream of events that ends its source as soon as the client disconnects, not when it is garbage-collected."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _chain(first: Any, others: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for other in others:
        yield other


async def _body(request: Request, limit: int) -> bytes:
    """Read the body, up to `limit` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send without permission (CORS)
        raise RequestError(f"the body must be application/json, not {kind or 'of no type'}", status=415)
    too_large = RequestError(f"the body is larger than {limit:,} bytes", status=413, code="request_too_large")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {_BODY_SECONDS} s", status=408) from None
    return bytes(body)


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
