"""A small HTTP server for the tests of remote shards, which counts its requests and fails where a test asks for it."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_BLOCK = 1 << 14


class TarServer:
    """Serves `files` by name, with an index page of them at ``/``.

    `faults[name]` are what happens to the next requests for a file instead: a status code, or "cut" for a connection
    that breaks half-way. `pause` is a delay in seconds before each block of 16 kB, `ranges` whether parts can be asked
    for, `lengths` whether the size is reported.
    """

    def __init__(self, *, ranges: bool = True, lengths: bool = True, pause: float = 0.0) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges, self.lengths, self.pause = ranges, lengths, pause
        handler = type("Handler", (_Handler,), {"served": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, end: str, method: str = "GET") -> int:
        """How often a file whose name ends so was asked for."""
        return sum(name.endswith(end) for how, name in self.requests if how == method)


class _Handler(BaseHTTPRequestHandler):
    served: TarServer

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""

    def _answer(self, method: str) -> None:
        name = self.path.partition("?")[0].strip("/")
        self.served.requests.append((method, name))
        faults = self.served.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int) or (name and name not in self.served.files):
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        body = self.served.files[name] if name else self._page()
        whole = len(body)
        wanted = self.headers.get("Range")
        if wanted and self.served.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/x-tar" if name else "text/html")
        if self.served.lengths or not name:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if method == "GET":
            self._send(body[: len(body) // 2] if fault == "cut" else body)

    def _page(self) -> bytes:
        return "".join(f'<a href="{name}">{name}</a>' for name in self.served.files).encode()

    def _send(self, body: bytes) -> None:
        try:
            for start in range(0, len(body), _BLOCK):
                time.sleep(self.served.pause)
                self.wfile.write(body[start : start + _BLOCK])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
