"""Images from the web: whatever the URL or the server does, nothing private is asked and nothing goes on for ever."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.apps import fetch_image as fetch
from tinygptv_ds.apps.fetch_image import fetch_image
from tinygptv_ds.errors import DataError

BODY = bytes(range(256)) * 8


class Handler(BaseHTTPRequestHandler):
    """`/ok`, `/to/URL` (moved there), `/loop`, `/long` (no length, no end), `/slow` (drips), `/short`, `/404`."""

    def do_GET(self) -> None:
        name, _, rest = self.path[1:].partition("/")
        if name in ("to", "loop"):
            self.send_response(302)
            self.send_header("Location", rest or self.path)
            self.end_headers()
            return
        if name == "404":
            self.send_error(404)
            return
        self.send_response(200)
        if name in ("ok", "short"):
            self.send_header("Content-Length", str(len(BODY) + (name == "short")))
        self.end_headers()
        try:
            self.wfile.write(BODY)
            while name in ("long", "slow"):
                self.wfile.write(b"x" if name == "slow" else BODY)
                time.sleep(0.05 if name == "slow" else 0)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_a_image(server: str) -> None:
    assert fetch_image(f"{server}/ok", allow_private=True) == BODY
    assert fetch_image(f"{server}/to//ok", allow_private=True, max_bytes=len(BODY)) == BODY
    assert fetch_image(f"{server}/ok/é?a=ü b".replace(" ", "%20"), allow_private=True) == BODY


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/404", "the server answers 404"),
        ("/loop", "more than 5 redirections"),
        ("/to/file:///etc/passwd", "begins with http:// or https://"),
        ("/long", "larger than 100,000 bytes"),
        ("/short", "ends 1 bytes early"),
    ],
)
def test_what_a_server_may_do(server: str, path: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        fetch_image(server + path, allow_private=True, max_bytes=100_000)


def test_a_drip_has_an_end(server: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"longer than 0\.3 s"):
        fetch_image(f"{server}/slow", allow_private=True, timeout=0.3)
    assert time.monotonic() - began < 5


def test_silence_has_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DataError, match=r"longer than 0\.2 s"):
            fetch_image(url, allow_private=True, timeout=0.2)
    with pytest.raises(DataError, match=r"refused|reset"):
        fetch_image(url, allow_private=True, timeout=5)


def test_private_addresses_are_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by number, by name, and where a public server redirects to one."""
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
        with pytest.raises(DataError, match=r"not on the public internet|not known"):
            fetch_image(f"http://{host}:{port}/ok")
    public = lambda found: "192.168.0.9" not in found and "10.0.0.1" not in found  # noqa: E731
    monkeypatch.setattr(fetch, "_is_public", public)
    assert fetch_image(f"{server}/ok") == BODY
    with pytest.raises(DataError, match=r"192\.168\.0\.9, which is not on the public internet"):
        fetch_image(f"{server}/to/http://192.168.0.9/ok")
    several = [(socket.AF_INET, 0, 0, "", (address, 0)) for address in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: several)
    with pytest.raises(DataError, match=r"10\.0\.0\.1"):
        fetch_image(f"http://image.example:{port}/ok")


def test_the_address_that_was_checked_is_the_one_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is looked up once cannot point elsewhere the second time."""
    asked = []

    def lookup(host: str, port: int, **_: object) -> list:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda host, port, *_, **__: lookup(host, port))
    monkeypatch.setattr(fetch, "_is_public", lambda _: True)
    assert fetch_image(server.replace("127.0.0.1", "image.example") + "/ok") == BODY
    assert asked.count("image.example") == 1


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3", "172.16.0.1", "192.168.1.1", "127.9.9.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "2002:7f00:1::",
        "64:ff9b::a00:1", "192.0.2.1", "198.18.0.1",
    ],
)  # fmt: skip
def test_what_is_not_public(address: str) -> None:
    assert not fetch._is_public(address)
    assert fetch._is_public("8.8.8.8") and fetch._is_public("2606:4700::1111")


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_ipv6_is_no_way_round(address: ipaddress.IPv4Address) -> None:
    if not fetch._is_public(str(address)):
        for hidden in (
            f"::ffff:{address}",
            f"64:ff9b::{address}",
            f"2002:{int(address) >> 16:x}:{int(address) & 65535:x}::",
        ):
            assert not fetch._is_public(str(ipaddress.ip_address(hidden)))


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("ftp://a.example/x", "begins with http"), ("http:///x", "begins with http"),
        ("https://a:b@/x", "names a host"),
        ("http://a.example:x/", "not a URL"), ("http://[::1", "not a URL"), ("http://a.example/x y", "white space"),
        ("http://a.example/x\r\nHost: b", "white space"),
    ],
)  # fmt: skip
def test_what_is_no_url(url: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        fetch_image(url)


def test_no_password_in_a_message() -> None:
    assert fetch.shown("https://me:secret@a.example/x?y") == "https://a.example/x?y"
