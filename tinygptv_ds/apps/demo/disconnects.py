"""Clients that disconnect: gradio's server logs a traceback for each, although nothing is to be repaired."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

_NOT_FOUND = 404


def hide_disconnects() -> None:
    """Leave out of the server's log that a visitor has left during an upload, or come back to an ended session.

    Remove when gradio answers such requests itself.
    """
    logging.getLogger("uvicorn.error").addFilter(_is_of_the_server)


def _is_of_the_server(record: logging.LogRecord) -> bool:
    """Return whether a record is about anything else; an error within another is looked through."""
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        unknown_session = isinstance(error, HTTPException) and error.status_code == _NOT_FOUND
        if isinstance(error, ClientDisconnect) or unknown_session:
            return False
        error = error.__cause__ or error.__context__
    return True
