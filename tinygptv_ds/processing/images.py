"""Encoded pictures to uint8 pixels, exactly as the original's transform sees them.

RGB, resized to a square bicubically without keeping the aspect ratio. The original goes on to floats and normalises;
here pixels stay uint8 until they are on the device (`TinyGPTVForConditionalGeneration.normalize`).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tinygptv_ds.errors import DataError

MAX_PIXELS = 100_000_000


def open_image(source: bytes | str | Path | Image.Image) -> Image.Image:
    """Decode to RGB (alpha dropped, EXIF rotation ignored).

    Raises:
        DataError: not a picture, cut short, or above 100 megapixels by its header.
    """
    try:
        image = source
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"a picture of {image.width} x {image.height} pixels is refused (limit {MAX_PIXELS:,})")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        raise DataError(f"{name}the picture cannot be decoded: {error}") from error


def to_pixels(source: bytes | str | Path | Image.Image, image_size: int) -> np.ndarray:
    """uint8 `[3, image_size, image_size]`; errors as in `open_image`."""
    resized = open_image(source).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1).copy()
