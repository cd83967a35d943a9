"""Images of a request: decoded from `data:` URLs or fetched, checked, and resized to the model's image size."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from concurrent.futures import Executor
from dataclasses import dataclass
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from tinygptv_ds.apps.fetch_image import fetch_image, is_url
from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.request_schema import ChatRequest
from tinygptv_ds.errors import DataError
from tinygptv_ds.processes import return_freed_memory
from tinygptv_ds.processing.image import WHITE, Color, can_be_reduced, read_image_size, to_pixels

_LARGE = 4_000_000  # pixels of an image whose memory is worth returning
# `data:`, the media type, parameters of which values in quotes may hold commas, perhaps `;base64`, and a comma
_DATA_URL = re.compile(
    r'data:([^;,"]{0,200})(?:;(?!\s*base64\s*,)(?:[^;,"]|"[^"]{0,200}"){0,200}){0,9}(;\s*base64\s*)?,',
    re.IGNORECASE,
)
_MOST_ESCAPES = 1_000_000  # each takes 40 bytes of memory while it is decoded
_BASE64_SPELLINGS = str.maketrans("-_", "+/", " \t\r\n")


@dataclass(frozen=True)
class ImageLimits:
    """Limits of the images of a request, and how they are read.

    Attributes:
        count: number of images in all messages.
        bytes: encoded size of each.
        pixels: pixels of each, according to its header; of a larger JPEG, half as many along each side or fewer.
        fetch: whether http(s) URLs are fetched.
        domains: the hosts from which images are fetched; empty: any public one.
        background: see processing/image.py.
    """

    count: int
    bytes: int
    pixels: int
    fetch: bool = True
    domains: frozenset[str] = frozenset()
    background: Color | None = WHITE


async def load_images(
    request: ChatRequest, side: int, limits: ImageLimits, decoders: Executor
) -> list[list[Image.Image]]:
    """Load the images of each message, resized to `side` x `side` as the model does it: exactly, if not too large.

    Args:
        request: from `parse_request`.
        side: the model's image size.
        limits: limits of the images.
        decoders: the threads that decode, whose number bounds the memory for decoded images.

    Raises:
        RequestError: there are too many, or one is too large, not an image, or cannot be fetched.
    """
    places = [
        (number, f"messages[{number}].content[{at}].image_url.url", part.image_url.url)
        for number, message in enumerate(request.messages)
        for at, part in enumerate(message.content)
        if part.type == "image_url"
    ]
    if len(places) > limits.count:
        raise RequestError(f"{len(places)} images; at most {limits.count} may come with a request", param="messages")
    loaded: list[list[Image.Image]] = [[] for _ in request.messages]
    for number, param, url in places:
        try:
            encoded = await _encoded(url, limits)
            decoding = asyncio.get_running_loop().run_in_executor(decoders, _decode, encoded, side, limits)
            loaded[number].append(await decoding)
        except DataError as error:
            raise RequestError(str(error), param=param, code="invalid_image") from None
    return loaded


def _decode(encoded: bytes, side: int, limits: ImageLimits) -> Image.Image:
    width, height = read_image_size(encoded)
    large = width * height > limits.pixels
    if large and not (can_be_reduced(encoded) and min(width, height) >= 2 * side):
        raise DataError(
            f"an image of {width} x {height} pixels is above the limit of {limits.pixels:,}; send it smaller, or as a "
            "JPEG that is not progressive, which is then decoded at half its size or less"
        )
    try:
        pixels = to_pixels(encoded, side, "fast" if large else "exact", background=limits.background)
        return Image.fromarray(pixels.transpose(1, 2, 0))
    finally:
        if width * height > _LARGE:
            return_freed_memory()


async def _encoded(url: str, limits: ImageLimits) -> bytes:
    url = url.strip()
    if url[:5].lower() == "data:":
        return _from_data_url(url, limits)
    if not is_url(url):
        raise DataError(
            "an image is given as data:image/jpeg;base64,... or as http(s)://..., not as bare base64 or a path"
        )
    if not limits.fetch:
        raise DataError("this server fetches no images; send a data URL")
    return await asyncio.to_thread(fetch_image, url, max_bytes=limits.bytes, domains=limits.domains)


def _from_data_url(url: str, limits: ImageLimits) -> bytes:
    """Decode a data URL; white space, missing padding and the URL-safe alphabet are read as clients write them."""
    head = _DATA_URL.match(url)
    kind, in_base64 = (head[1].strip().lower(), bool(head[2])) if head else ("", False)
    if head is None or not (in_base64 or "%" in url or "<" in url):
        raise DataError("a data URL must look like data:image/jpeg;base64,...")
    if not (kind in ("", "application/octet-stream") or kind.startswith("image/")):
        raise DataError(f"the data URL says that it is {kind[:50]!r}; an image's begins with data:image/")
    data = url[head.end() :]
    if len(data) // 4 * 3 > limits.bytes * 1.1 + 2:  # line breaks add up to 3 %
        raise DataError(f"the image is larger than {limits.bytes:,} bytes")
    if data.count("%") > _MOST_ESCAPES:
        raise DataError(f"the data URL has more than {_MOST_ESCAPES:,} percent signs; write it in base64")
    encoded = _from_base64(data) if in_base64 else unquote_to_bytes(data)
    if len(encoded) > limits.bytes:
        raise DataError(f"the image is larger than {limits.bytes:,} bytes")
    return encoded


def _from_base64(data: str) -> bytes:
    compact = unquote(data).translate(_BASE64_SPELLINGS).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data URL holds no base64: {error}") from None
