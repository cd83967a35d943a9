"""Encoded images to uint8 pixels, exactly as the original's transform sees them.

RGB, resized to a square bicubically without keeping the aspect ratio. The original goes on to floats and normalises;
here pixels stay uint8 until they are on the device (`TinyGPTVForConditionalGeneration.normalize`).

Pillow reads every header and says what is wrong. Ordinary JPEGs are decoded by simplejpeg, whose libjpeg-turbo gives
Pillow's own values sooner; whatever it refuses or has a warning for goes to Pillow.
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
# No others: some of Pillow's readers start programs (EPS), and all of them would be tried on what is no image.
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
    """Width and height by the header, before anything is decoded; errors as in `open_image`."""
    with _refusals(source):
        return _open(source)[0].size


def to_pixels(source: Source, image_size: int, decoding: str = "exact") -> np.ndarray:
    """uint8 `[3, image_size, image_size]`; errors as in `open_image`.

    Args:
        source: the image.
        image_size: side of the result.
        decoding: "exact": what Pillow gives. "fast": JPEGs of at least twice `image_size` are decoded at a half or less
            and then resized; photos move by 1 to 3 of 255 on average, fine stripes by more.
    """
    from tinygptv_ds.processing.resize import resize  # numba takes its time, and who only opens images needs none

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
    """Whatever goes wrong with an image is a DataError; Pillow's readers raise nearly everything."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        alien = isinstance(error, UnidentifiedImageError)
        why = f"it is none of {', '.join(FORMATS)}" if alien else str(error) or type(error).__name__
        raise DataError(f"{name}the image cannot be decoded: {why}") from error


def _open(source: Source) -> tuple[Image.Image, bytes | None]:
    """The image, with nothing but its header read, and its bytes where it is not decoded yet."""
    if isinstance(source, Image.Image):
        return source, None
    encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise DataError(f"an image of {image.width} x {image.height} pixels is refused (limit {MAX_PIXELS:,})")
    return image, encoded


def _decode_jpeg(encoded: bytes, size: tuple[int, int], at_least: int | None) -> np.ndarray | None:
    """uint32 `[H, W]` as `resize` takes it; None where it is Pillow's turn.

    Args:
        encoded: the file.
        size: width and height by Pillow's reading of the header.
        at_least: decode to the smallest size that both sides allow, were it half of the file's or less; None: as it is.
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
    """uint32 `[H, W]` as `resize` takes it, decoded by Pillow."""
    raw = image.convert("RGB").tobytes("raw", "RGBX")
    return np.frombuffer(raw, "<u4").reshape(image.height, image.width).copy()  # compiled code wants to own its input
