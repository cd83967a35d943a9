"""Answers in the form of OpenAI's API: whole, or as a stream of events."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.batch_loop import Finish, Piece
from tinygptv_ds.apps.serve.generation_queue import Place
from tinygptv_ds.generate.logprobs import Candidate, TokenBytes, TokenLogprob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """An answer in the form of OpenAI's API, whole or as events.

    Attributes:
        model: the model's name.
        prompt_tokens: number of tokens of the prompt.
        token_bytes: of the tokenizer, if the request asks for log-probabilities.
    """

    model: str
    prompt_tokens: int
    token_bytes: TokenBytes | None = None

    async def whole(self, pieces: AsyncGenerator[Piece | Finish]) -> dict[str, Any]:
        """Return a `chat.completion`."""
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Finish):
                    message = {"role": "assistant", "content": "".join(text), "refusal": None}
                    choice = {"message": message, "logprobs": self._logprobs(logprobs), "finish_reason": piece.reason}
                    return self._object("chat.completion", choice) | {"usage": self._usage(piece)}
                text.append(piece.text)
                logprobs += piece.logprobs
        raise RuntimeError("the answer has no end")

    async def events(
        self, first: Piece | Finish, pieces: AsyncGenerator[Piece | Finish], *, usage: bool
    ) -> AsyncGenerator[str]:
        """Yield `chat.completion.chunk`s as server-sent events."""
        constant = self._object("chat.completion.chunk", {})

        def event(delta: dict[str, str], reason: str | None = None, logprobs: dict[str, Any] | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _event(constant | {"choices": [choice]} | ({"usage": None} if usage else {}))

        yield event({"role": "assistant", "content": ""})
        async with aclosing(pieces):
            try:
                async for piece in _chain(first, pieces):
                    if isinstance(piece, Piece):
                        yield event({"content": piece.text}, logprobs=self._logprobs(piece.logprobs))
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

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.token_bytes is None:
            return None
        content = [
            self._candidate(token) | {"top_logprobs": [self._candidate(each) for each in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _candidate(self, token: Candidate) -> dict[str, Any]:
        assert self.token_bytes is not None
        data = self.token_bytes(token.id)
        return {
            "token": f"token_id:{token.id}" if data is None else _readable(data),
            "logprob": token.logprob,
            "bytes": None if data is None else list(data),
        }

    def _usage(self, finish: Finish) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": finish.tokens,
            "total_tokens": self.prompt_tokens + finish.tokens,
        }


class EventStream(StreamingResponse):
    """A stream of events that leaves the queue as soon as the client disconnects, even before the first event."""

    def __init__(self, events: AsyncGenerator[str], place: Place) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()


def _readable(token: bytes) -> str:
    r"""Return the text of a token, or `bytes:\xe2\x80` for one that is a part of a character, as OpenAI's API does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


async def _chain(first: Any, others: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for other in others:
        yield other


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
