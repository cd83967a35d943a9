"""What a request can be refused for, in the shape in which OpenAI's API says it."""

from __future__ import annotations

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


class Refused(Exception):
    """A request that is not carried out.

    Args:
        message: what is wrong and what to do.
        status: of HTTP.
        param: the field of the request that is wrong.
        code: a word for programs, such as `model_not_found`.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer to the client."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}.get(self.status)
        return JSONResponse(self.body, self.status, headers)
