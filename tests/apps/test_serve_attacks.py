"""Malicious requests: each is a 4xx in the form of OpenAI's API, in bounded time and memory."""

import base64
import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from helpers.patience import PATIENCE
from test_serve import DEFAULTS, HELLO, LIMITS, NAME, Slow, With, answerer, encoded, said, serving, until

from tinygptv_ds.apps.serve import connections, request_body
from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.request_json import read_json
from tinygptv_ds.apps.serve.routes import build_app
from tinygptv_ds.generate.answerer import Answerer
from tinygptv_ds.generate.row import Row

__all__ = ["answerer"]
OK = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def address(answerer: Answerer) -> Iterator[str]:
    with serving(build_app(answerer, DEFAULTS, LIMITS)) as there:
        yield there


@pytest.fixture
def post(address: str) -> Callable[..., httpx.Response]:
    def send(body: bytes, **headers: str) -> httpx.Response:
        given = {"Content-Type": "application/json"} | headers
        return httpx.post(f"{address}/v1/chat/completions", content=body, headers=given, timeout=PATIENCE)

    return send


def with_field(name: str, value: str) -> bytes:
    return OK[:-1] + f', "{name}": {value}}}'.encode()


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"{", "invalid_json", "the body is not JSON"),
        (b"[]", "invalid_json", "the body must be a JSON object"),
        (b'{"temperature": NaN}', "invalid_json", "NaN is no number"),
        (b"[" * 900 + b"]" * 900, "invalid_json", "must be a JSON object"),
        (b"[" * 9000 + b"]" * 9000, "invalid_json", "nested too deeply"),
        (b'{"a":' * 9000 + b"1" + b"}" * 9000, "invalid_json", "nested too deeply"),
        (with_field("metadata", "[" + "[]," * 60_000 + "[]]"), "too_many_values", "commas and brackets"),
        (with_field("max_tokens", "3"), "invalid_json", "'max_tokens' is there more than once"),
        (with_field("metadata", '{"a": 1, "a": 2}'), "invalid_json", "'a' is there more than once"),
        (with_field("seed", "9" * 5000), "invalid_json", "a number has 5,000 digits"),
        (with_field("seed", "9" * 1000), "invalid_value", "seed: "),
        (with_field("temperature", "1e999"), "invalid_value", "less than or equal to 2, not inf"),
        (with_field("temperature", "1" * 400), "invalid_value", "temperature"),
        (b'{"model": "\xff"}', "invalid_json", "utf-8"),
        (OK.decode().encode("utf-16"), "invalid_json", "utf-8"),
        (with_field("x" * 100_000, "1"), "unsupported_parameter", "..."),
        (json.dumps({"model": "m" * 100_000, "messages": HELLO}).encode(), "model_not_found", "..."),
        (json.dumps({"model": NAME, "messages": [said("x" * 150_000)]}).encode(), "context_length_exceeded", "150,000"),
    ],
)  # fmt: skip
def test_bodies(post: Callable[..., httpx.Response], body: bytes, code: str, words: str) -> None:
    reply = post(body)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and (error["code"], words in error["message"]) == (code, True), error
    assert len(reply.content) < 5000 and error.keys() == {"message", "type", "param", "code"}


def test_a_byte_order_mark_is_no_harm(post: Callable[..., httpx.Response]) -> None:
    assert post(b"\xef\xbb\xbf" + OK).status_code == 200


def test_many_values_at_a_great_depth_take_linear_time() -> None:
    """Looking for half characters in them once took the number of values times their depth."""
    body = b'{"a":' + b"[" * 900 + b",".join([b'"x"'] * 300_000) + b"]" * 900 + b"}"
    began = time.process_time()
    assert read_json(body, 400_000)["a"]
    assert time.process_time() - began < PATIENCE / 4
    with pytest.raises(RequestError, match="300,900 commas and brackets, above the limit of 300,000"):
        read_json(body, 300_000)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text/html", "says that it is 'text/html'"),
        ("application/pdf", "says that it is 'application/pdf'"),
        ("image/png", ""),
        ("image/jpeg", ""),  # as clients write who do not know better
        ("application/octet-stream", ""),
        ("", ""),
        ("image/png;charset=utf-8", ""),
    ],
)
def test_the_kind_of_a_data_url(post: Callable[..., httpx.Response], kind: str, words: str) -> None:
    url = f"data:{kind};base64," + base64.b64encode(encoded()).decode()
    reply = post(json.dumps({"model": NAME, "messages": [said("what?", url)], "max_tokens": 2}).encode())
    assert reply.status_code == (400 if words else 200), reply.text
    assert words in reply.text


def test_headers_and_paths(post: Callable[..., httpx.Response], address: str) -> None:
    assert post(b"{}", **{"Content-Type": "text/plain"}).status_code == 415
    assert post(b" " * 200_001).status_code == 413
    packed = post(gzip.compress(OK), **{"Content-Encoding": "gzip"})
    assert packed.status_code == 415 and "a body in gzip is not read" in packed.text
    assert post(OK, **{"Content-Encoding": "identity"}).status_code == 200
    missing = httpx.get(f"{address}/v1/nothing%00%0d%0a")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"
    for method in ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "BREW"):
        refused = httpx.request(method, f"{address}/v1/chat/completions")
        assert (refused.status_code, refused.headers["Allow"]) == (405, "POST"), method
        assert method == "HEAD" or refused.json()["error"]["message"].endswith("Method Not Allowed")


def exchange(address: str, sent: bytes) -> bytes:
    """Return all that the server sends until it closes the connection."""
    with socket.create_connection(address.removeprefix("http://").split(":"), timeout=PATIENCE) as channel:
        channel.sendall(sent)
        found = b""
        while block := channel.recv(100_000):
            found += block
        return found


TWO_LENGTHS = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 66_000,  # more may follow
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        HEAD + TWO_LENGTHS + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",  # which a proxy might have hidden
        HEAD.replace(b"/v1/chat/completions", b"/nothing") + TWO_LENGTHS,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    ],
)
def test_what_is_no_http(address: str, sent: bytes) -> None:
    head, _, body = exchange(address, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"  # and nothing follows it


def test_requests_in_a_row_without_waiting(address: str) -> None:
    """Pipelined: each is answered, in order."""
    last = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    found = exchange(address, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50 + last)
    assert found.count(b"HTTP/1.1 200 OK") == 51 and found.count(b'"ready"') == 50


def test_a_chunked_body_without_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "_SECONDS", 0.3)
    found = exchange(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
    assert found.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.3 s" in found


def test_a_connection_without_a_request_is_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent ones and those whose header never ends, also after a request; meanwhile others are answered."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    place = address.removeprefix("http://").split(":")
    openings = [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-a: ", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"]
    opened = [socket.create_connection(place, timeout=PATIENCE) for _ in openings * 20]
    for channel, opening in zip(opened, openings * 20, strict=True):
        channel.sendall(opening)
    assert httpx.get(f"{address}/health").status_code == 200
    for channel in opened:
        while channel.recv(10_000):  # ends when the server closes the connection
            pass
        channel.close()


def test_too_many_connections_are_refused_in_the_api_s_form(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 0)
    refused = httpx.get(f"{address}/health")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert refused.headers["Retry-After"]


def test_who_does_not_read_loses_his_connection(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that fills all buffers neither goes on nor keeps its connection."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(Row, "piece", lambda _: "a" * 100_000)
    slow = Slow()
    with serving(build_app(With(answerer, slow), DEFAULTS, LIMITS)) as address:
        place = address.removeprefix("http://").split(":")
        with socket.create_connection(place, timeout=PATIENCE) as channel:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({"model": NAME, "messages": HELLO, "stream": True}).encode()
            channel.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: slow.begun == 1)
            until(lambda: httpx.get(f"{address}/health").json()["in_hand"] == 0)
