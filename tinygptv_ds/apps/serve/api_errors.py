"""Errors of requests, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_LONGEST = 1000  # characters of a message, which may repeat a part of the request
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "10"}}


class RequestError(Exception):
    """A request that is refused or has failed.

    Args:
        message: what is wrong, and the remedy.
        status: the HTTP status.
        param: the field of the request that is wrong.
        code: an identifier for programs, for example `model_not_found`.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        message, param = _short(message), None if param is None else _short(param)
        super().__init__(message)
        self.status, self.code = status, code
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return the response to the client, with these headers in addition to its own."""
        return JSONResponse(self.body, self.status, {**_HEADERS.get(self.status, {}), **(headers or {})})


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
