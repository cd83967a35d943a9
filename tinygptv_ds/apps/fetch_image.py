"""Images fetched from URLs in other people's questions: no private address, no endless or huge download. No torch.

The connection goes to the address that was checked, so a name cannot resolve to another one a moment later. Proxies are
not used, because behind one the address is unknown.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from tinygptv_ds import __version__
from tinygptv_ds.errors import DataError

MAX_BYTES = 20_000_000
TIMEOUT = 20.0
_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses inside IPv6 ones
# IANA's registries of special-purpose addresses (https://www.iana.org/assignments/iana-ipv4-special-registry and
# .../iana-ipv6-special-registry), and multicast. Of IPv6, nothing but 2000::/3 has been allocated for global unicast.
_SPECIAL_IPV4 = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
_SPECIAL_IPV6 = [
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4, which embeds an IPv4 address
        "3fff::/20",
    )
]
_SAFE = "%/:=&?~+!$,;'@()*[]"  # characters of a path and a query


def fetch_image(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    allow_private: bool = False,
    domains: Collection[str] = (),
) -> bytes:
    """Fetch the bytes of a URL; `processing.image` checks that they are an image when it decodes them.

    Args:
        url: http or https.
        max_bytes: a larger file is refused.
        timeout: seconds for everything, including redirections.
        allow_private: whether addresses outside the public internet are allowed.
        domains: the hosts that are allowed, also after redirections; empty: any.

    Raises:
        DataError: the URL is refused or missing, too large or too slow; names it without its password.
    """
    until = time.monotonic() + timeout
    try:
        for _ in range(_REDIRECTS + 1):
            parts = checked_url(url)
            if domains and parts.hostname not in domains:
                raise DataError(f"{shown(url)}: refused; images are fetched from {', '.join(sorted(domains))} only")
            moved, content = _get(parts, _addresses(parts, allow_private), max_bytes, until)
            if moved is None:
                return content
            url = urljoin(url, moved)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= until
        why = f"it took longer than {timeout:g} s" if late else str(error) or type(error).__name__
        raise DataError(f"{shown(url)}: cannot be fetched: {why}") from None
    raise DataError(f"{shown(url)}: cannot be fetched: more than {_REDIRECTS} redirections")


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a path."""
    return "://" in text[:32]


def checked_url(url: str) -> SplitResult:
    """Split a URL that may be fetched, judging by its text.

    Raises:
        DataError: it is not a URL, or has another scheme.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DataError(f"{shown(url)}: not a URL: {error}") from None
    if parts.scheme not in _PORTS or not host:
        raise DataError(f"{shown(url)}: an image's URL begins with http:// or https:// and names a host")
    if any(ord(character) < 33 or ord(character) == 127 for character in url):
        raise DataError(f"{shown(url)}: a URL must not contain white space; write %20")
    return parts


def shown(url: str) -> str:
    """Return a URL for messages, without user and password and not too long."""
    scheme, mark, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    text = f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _addresses(parts: SplitResult, allow_private: bool) -> list[tuple[str, int]]:
    """Resolve the host; all of its addresses must be allowed."""
    port = parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise DataError(f"{shown(parts.geturl())}: the host is not known ({error})") from None
    addresses = list(dict.fromkeys((str(entry[4][0]), port) for entry in found))
    private = [address for address, _ in addresses if not _is_public(address)]
    if private and not allow_private:
        raise DataError(
            f"{shown(parts.geturl())}: refused because {parts.hostname} is {private[0]}, which is not on the public "
            "internet"
        )
    return addresses


def _is_public(address: str) -> bool:
    """Return whether an address is on the public internet; Python's own tables differ by its patch level."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in network for network in _SPECIAL_IPV4)
    if found.ipv4_mapped is not None:
        return _is_public(str(found.ipv4_mapped))
    if found in _NAT64:
        return _is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found in _GLOBAL_IPV6 and not any(found in network for network in _SPECIAL_IPV6)


def _get(
    parts: SplitResult, addresses: list[tuple[str, int]], max_bytes: int, until: float
) -> tuple[str | None, bytes]:
    """Request a URL; return its new location, or None and the content."""
    where = shown(parts.geturl())
    channel = _connect(parts, addresses, until)
    # Ends even a download that trickles in. The socket's own shutdown, below TLS, wakes the reader.
    alarm = threading.Timer(_left(until), socket.socket.shutdown, (channel, socket.SHUT_RDWR))
    alarm.daemon = True
    alarm.start()
    try:
        response = _request(parts, channel)
        if response.status in _MOVED and response.getheader("Location"):
            return response.getheader("Location"), b""
        if response.status != 200:
            raise DataError(f"{where}: the server answers {response.status} {response.reason}")
        content = response.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise DataError(f"{where}: larger than {max_bytes:,} bytes")
        _left(until)  # a download that the alarm has cut off looks complete
        if response.length:
            raise OSError(f"it ends {response.length} bytes early")
        return None, content
    finally:
        alarm.cancel()
        channel.close()


def _request(parts: SplitResult, channel: socket.socket) -> http.client.HTTPResponse:
    assert parts.hostname is not None  # see `checked_url`
    connection = http.client.HTTPConnection(parts.hostname, parts.port or _PORTS[parts.scheme])
    connection.default_port = _PORTS[parts.scheme]  # omitted from the Host header
    connection.sock = channel
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_SAFE)
    agent = f"tinygptv_ds/{__version__}"
    connection.request("GET", target, headers={"User-Agent": agent, "Accept": "image/*", "Accept-Encoding": "identity"})
    return connection.getresponse()


def _connect(parts: SplitResult, addresses: list[tuple[str, int]], until: float) -> socket.socket:
    """Connect to the first address that answers; connecting by address resolves no name again."""
    error: OSError | None = None
    for address in addresses:
        try:
            channel = socket.create_connection(address, timeout=_left(until))
        except OSError as refused:
            error = refused
            continue
        if parts.scheme == "http":
            return channel
        try:
            return ssl.create_default_context().wrap_socket(channel, server_hostname=parts.hostname)
        except BaseException:
            channel.close()
            raise
    raise error or OSError("the host has no address")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
