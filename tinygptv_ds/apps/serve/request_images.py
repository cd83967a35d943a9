"""Images of a request: decoded from `data:` URLs or fetched, checked, and resized to the model's image size."""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass

from PIL import Image

from tinygptv_ds.apps.fetch_image import fetch_image
from tinygptv_ds.apps.serve.api_errors import RequestError
from tinygptv_ds.apps.serve.request_schema import ChatRequest
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import read_image_size, to_pixels


@dataclass(frozen=True)
class ImageLimits:
    """Limits of the images of a request.

    Attributes:
        count: number of images in all messages.
        bytes: encoded size of each.
        pixels: pixels of each, according to its header.
        fetch: whether http(s) URLs are fetched.
    """

    count: int
    bytes: int
    pixels: int
    fetch: bool = True


async def load_images(request: ChatRequest, side: int, limits: ImageLimits) -> list[list[Image.Image]]:
    """Load the images of each message, resized to `side` x `side` exactly as the model does it.

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
        loaded[number].append(await asyncio.to_thread(_load, url, param, side, limits))
    return loaded


def _load(url: str, param: str, side: int, limits: ImageLimits) -> Image.Image:
    try:
        encoded = _decoded(url, limits) if url[:5].lower() == "data:" else _fetched(url, limits)
        width, height = read_image_size(encoded)
        if width * height > limits.pixels:
            raise DataError(f"an image of {width} x {height} pixels is above the limit of {limits.pixels:,}")
        return Image.fromarray(to_pixels(encoded, side).transpose(1, 2, 0))
    except DataError as error:
        raise RequestError(str(error), param=param, code="invalid_image") from None


def _decoded(url: str, limits: ImageLimits) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError("a data URL must look like data:image/jpeg;base64,...")
    if len(data) // 4 * 3 > limits.bytes + 2:
        raise DataError(f"the image is larger than {limits.bytes:,} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data URL holds no base64: {error}") from None


def _fetched(url: str, limits: ImageLimits) -> bytes:
    if not limits.fetch:
        raise DataError("this server fetches no images; send a data URL")
    return fetch_image(url, max_bytes=limits.bytes)
