"""Short messages between rank 0 and every other rank, on connections that no collective can block."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any

from tinygptv_ds.distributed import Ranks, broadcast_from_rank0
from tinygptv_ds.errors import ConfigError

Message = dict[str, Any]
HELLO: Message = {}  # received when a rank has connected
_CONNECT_SECONDS = 30.0
_HELLO_SECONDS = 10.0  # for a new connection to name its rank


class Channel:
    """JSON messages, one per line. The system closes the connections of a process that ends, in whatever way it ends.

    Args:
        ranks: this process among the ranks.
        on_message: called in the event loop with the sender's rank and its message; None: its connection is closed.
    """

    def __init__(self, ranks: Ranks, on_message: Callable[[int, Message | None], None]) -> None:
        self._ranks = ranks
        self._on_message = on_message
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._token = ""
        self._socket: socket.socket

    def open(self) -> None:
        """Connect the other ranks to rank 0. Call on all ranks, from the main thread.

        Raises:
            ConfigError: this rank cannot reach rank 0.
        """
        host = os.environ["MASTER_ADDR"]
        address = broadcast_from_rank0(self._ranks, lambda: self._listen(host))
        self._token = address["token"]
        if not self._ranks.is_main:
            try:
                self._socket = socket.create_connection((host, address["port"]), _CONNECT_SECONDS)
            except OSError as error:
                raise ConfigError(
                    f"rank {self._ranks.rank} on {socket.gethostname()} does not reach rank 0 at {host}, port "
                    f"{address['port']} ({error}): allow any port between the hosts, which the collectives need "
                    "as well; --set train.lost_after_seconds=0 trains without this connection, but then a lost rank "
                    "is noticed by time-outs only"
                ) from error
            # Now, not in the event loop: whatever ends this process from here on, rank 0 knows whose connection closes.
            self._socket.sendall(json.dumps({"token": self._token, "rank": self._ranks.rank}).encode() + b"\n")
            self._socket.setblocking(False)

    def _listen(self, host: str) -> Message:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server(("", 0), family=family, backlog=max(100, self._ranks.world_size))
        return {"port": self._socket.getsockname()[1], "token": secrets.token_hex(16)}

    async def start(self) -> None:
        """Start to receive, in the event loop that `on_message` is called in."""
        if self._ranks.is_main:
            self._server = await asyncio.start_server(self._accept, sock=self._socket)
            return
        reader, writer = await asyncio.open_connection(sock=self._socket)
        self._add(0, reader, writer)

    def send(self, message: Message, to: int | None = None) -> None:
        """Send to all ranks, or to one, from rank 0, and to rank 0 from the others; never waits."""
        line = json.dumps(message).encode() + b"\n"
        for rank, writer in self._writers.items():
            if to in (None, rank):
                writer.write(line)

    @property
    def is_alone(self) -> bool:
        """Return whether no connection is open."""
        return not self._writers

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello: Message = {}
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), _HELLO_SECONDS))
        if not isinstance(hello, dict) or not secrets.compare_digest(str(hello.get("token")), self._token):
            writer.close()  # not one of the ranks, e.g. a port scanner
            return
        self._add(int(hello["rank"]), reader, writer)

    def _add(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[rank] = writer
        self._tasks.add(asyncio.create_task(self._receive(rank, reader)))
        self._on_message(rank, HELLO)

    async def _receive(self, rank: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._on_message(rank, json.loads(line))
        self._writers.pop(rank).close()
        self._on_message(rank, None)
