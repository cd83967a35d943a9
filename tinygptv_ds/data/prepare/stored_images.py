"""Images as a shard stores them: unchanged, or scaled down and encoded again."""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from tinygptv_ds.data.sets.common import SkipEntry, check_pixels, image_errors
from tinygptv_ds.errors import DataError

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_QUALITY = 95  # where an image must be encoded again and no quality is asked for


@dataclass(frozen=True)
class Encoding:
    """How images are stored: byte for byte as they are, unless one of these is set.

    `max_side`, in pixels: images with a longer side are scaled down to it, keeping their aspect, and stored as JPEG.
    `jpeg_quality`, 1 to 100: every image is stored as JPEG of this quality. Raises DataError for other values.
    """

    max_side: int | None = None
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise DataError(f"max_side must be at least 1 pixel, not {self.max_side}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality must be from 1 to 100, not {self.jpeg_quality}")


@lru_cache(maxsize=4)  # neighbouring entries often share an image
def stored_image(image: Path | bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Return (suffix, bytes) to store. Only the header is read of an image that stays unchanged.

    Raises SkipEntry if it is missing, not an image, of a format that is not read, or above 100 megapixels.
    """
    where = image if isinstance(image, Path) else "image"
    with image_errors(where):
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(data)) as opened:
            kind = check_pixels(opened).format
            if kind not in _SUFFIXES:
                raise SkipEntry("unsupported_image", f"{where} is of the format {kind}")
            scaled = encoding.max_side is not None and max(opened.size) > encoding.max_side
            if scaled or encoding.jpeg_quality is not None:
                return "jpg", _jpeg(opened, encoding.max_side if scaled else None, encoding.jpeg_quality or _QUALITY)
    return _SUFFIXES[kind], data


def _jpeg(opened: Image.Image, max_side: int | None, quality: int) -> bytes:
    """Encode the RGB image that training sees (alpha dropped, EXIF rotation ignored), without colour subsampling."""
    if max_side is not None:
        width, height = (max(1, round(side * max_side / max(opened.size))) for side in opened.size)
        opened.draft("RGB", (2 * width, 2 * height))  # a large JPEG is decoded at a fraction of its size
        rgb = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    else:
        rgb = opened.convert("RGB")
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()
