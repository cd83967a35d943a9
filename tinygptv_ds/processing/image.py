"""Encoded images to uint8 pixels, exactly as the original's transform sees them.

RGB, resized to a square bicubically without keeping the aspect ratio. The original goes on to floats and normalises;
here pixels stay uint8 until they are on the device (`TinyGPTVForConditionalGeneration.normalize`).

Pillow reads every header and reports errors. Ordinary JPEGs are decoded by simplejpeg, whose libjpeg-turbo gives
Pillow's own values sooner; files that it refuses or warns about are decoded by Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinygptv_ds.errors import DataError

MAX_PIXELS = 100_000_000
# No others: some of Pillow's readers start programs (EPS), and all of them would be tried on a file that is no image.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

Source = bytes | str | Path | Image.Image  # encoded, a path, or decoded


def open_image(source: Source) -> Image.Image:
    """Decode to RGB (alpha dropped, EXIF rotation ignored).

    Raises:
        DataError: not an image, cut short, or above 100 megapixels by its header.
    """
    with _refusals(source):
        return _open(source)[0].convert("RGB")


def read_image_size(source: Source) -> tuple[int, int]:
    """Read width and height from the header, without decoding; errors as in `open_image`."""
    with _refusals(source):
        return _open(source)[0].size


def to_pixels(source: Source, image_size: int, decoding: str = "exact") -> np.ndarray:
    """Decode and resize to uint8 `[3, image_size, image_size]`; errors as in `open_image`.

    Args:
        source: the image.
        image_size: side of the result.
        decoding: "exact": the values that Pillow gives. "fast": JPEGs of at least twice `image_size` are decoded at
            half their size or less and then resized; photos differ by 1 to 3 of 255 on average, fine stripes by more.
    """
    from tinygptv_ds.processing.resize import resize  # importing numba is slow, and only resizing needs it

    with _refusals(source):
        image, encoded = _open(source)
        packed = None
        if image.format == "JPEG" and image.mode in ("RGB", "L") and encoded is not None:
            packed = _decode_jpeg(encoded, image.size, image_size if decoding == "fast" else None)
        if packed is None:
            packed = _pack(image)
    return resize(packed, image_size)


@contextmanager
def _refusals(source: Source) -> Iterator[None]:
    """Raise DataError for anything that goes wrong with an image: Pillow's readers raise exceptions of many kinds."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        unrecognised = isinstance(error, UnidentifiedImageError)
        why = f"it is none of {', '.join(FORMATS)}" if unrecognised else str(error) or type(error).__name__
        raise DataError(f"{name}the image cannot be decoded: {why}") from error


def _open(source: Source) -> tuple[Image.Image, bytes | None]:
    """Return the image with only its header read, and its bytes where it is not decoded yet."""
    if isinstance(source, Image.Image):
        return source, None
    encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise DataError(f"an image of {image.width} x {image.height} pixels is refused (limit {MAX_PIXELS:,})")
    return image, encoded


def _decode_jpeg(encoded: bytes, size: tuple[int, int], at_least: int | None) -> np.ndarray | None:
    """Decode to uint32 `[H, W]` as `resize` takes it; None where Pillow has to decode the file.

    Args:
        encoded: the content of the file.
        size: width and height as Pillow reads them from the header.
        at_least: decode at the smallest scale, 1/2 at most, that leaves both sides this long; None: at full size.
    """
    import simplejpeg

    scaled = at_least is not None and min(size) >= 2 * at_least
    limits = {"min_width": at_least, "min_height": at_least, "min_factor": 2} if scaled else {}
    try:
        if simplejpeg.decode_jpeg_header(encoded)[1::-1] != size:
            return None
        pixels = simplejpeg.decode_jpeg(encoded, "RGBX", **limits)
    except ValueError:
        return None
    return pixels.view("<u4")[..., 0]


def _pack(image: Image.Image) -> np.ndarray:
    """Decode with Pillow to uint32 `[H, W]` as `resize` takes it."""
    raw = image.convert("RGB").tobytes("raw", "RGBX")
    return np.frombuffer(raw, "<u4").reshape(image.height, image.width).copy()  # compiled code needs a writable array
