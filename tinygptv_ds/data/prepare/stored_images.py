"""Images as a shard stores them: unchanged, upright and opaque, or scaled down and encoded again."""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tinygptv_ds.data.sets.common import SkipEntry, check_pixels, image_errors
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import (
    Color,
    ImageError,
    ImageTraits,
    encode,
    open_image,
    parse_background,
    plain_image,
    read_traits,
    stored_suffix,
)

_QUALITY = 95  # where an image must be encoded again and no quality is asked for
_FIRST_SIDEWAYS = 5  # orientations of EXIF from here on exchange width and height
_FIRST_FRAME = "first_frame_only"  # the one change that readers make themselves


@dataclass(frozen=True)
class Encoding:
    """How images are stored: byte for byte as they are, unless one of these is set.

    `max_side`, in pixels: images with a longer side are scaled down to it, keeping their aspect, and stored as JPEG.
    `jpeg_quality`, 1 to 100: every image is stored as JPEG of this quality. `background`, a color: images that are
    transparent, lie on their side by their EXIF orientation, or have more than 8 bits are stored as they should be
    seen, on this color; "none" and None leave them alone. Raises DataError for other values.
    """

    max_side: int | None = None
    jpeg_quality: int | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise DataError(f"max_side must be at least 1 pixel, not {self.max_side}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality must be from 1 to 100, not {self.jpeg_quality}")
        _ = self.color  # is it one?

    @property
    def color(self) -> Color | None:
        """The background; None: alpha is dropped and the orientation ignored, as in the original."""
        return None if self.background is None else parse_background(str(self.background))


class StoredImage(NamedTuple):
    """An image in a shard: its file name ending, its bytes, and the names of what was changed, for counting."""

    suffix: str
    data: bytes
    changes: tuple[str, ...] = ()


@lru_cache(maxsize=4)  # neighbouring entries often share an image
def stored_image(image: Path | bytes, encoding: Encoding) -> StoredImage:
    """Return an image as it is to be stored. Only the header is read of one that stays unchanged.

    Raises SkipEntry if it is missing, not an image, of a format that is not decoded, or above 100 megapixels.
    """
    where = image if isinstance(image, Path) else "image"
    with image_errors(where):
        data = image.read_bytes() if isinstance(image, Path) else image
        try:
            traits = read_traits(data)
            changes = _changes(traits) if encoding.color is not None else ()
            scaled = encoding.max_side is not None and max(traits.size) > encoding.max_side
            if scaled or encoding.jpeg_quality is not None:
                return StoredImage("jpg", _jpeg(data, traits, encoding, scaled=scaled), changes)
            suffix = stored_suffix(traits.format)
            if encoding.color is not None and (suffix is None or set(changes) - {_FIRST_FRAME}):
                return StoredImage(*plain_image(data, encoding.color), changes)
        except ImageError as error:
            if error.reason == "corrupt_image":
                with Image.open(io.BytesIO(data)) as opened:  # raises what is wrong, if that is its size or its header
                    check_pixels(opened)
            reason = "unreadable_image" if error.reason == "corrupt_image" else error.reason
            raise SkipEntry(reason, f"{where}: {error}") from error
    if suffix is None:
        raise SkipEntry("unsupported_image", f"{where} is of the format {traits.format}, which shards do not hold")
    return StoredImage(suffix, data, changes)


def _changes(traits: ImageTraits) -> tuple[str, ...]:
    """Return what is changed in an image that is stored as it should be seen."""
    changes = {
        "turned_upright": traits.orientation != 1,
        "laid_on_background": traits.transparent,
        "scaled_to_8_bit": traits.deep,
        _FIRST_FRAME: traits.animated,
    }
    return tuple(name for name, done in changes.items() if done)


def _jpeg(data: bytes, traits: ImageTraits, encoding: Encoding, *, scaled: bool) -> bytes:
    """Encode the RGB image that training sees, scaled down to the longest side if asked, as JPEG."""
    source: Image.Image | bytes = data
    width, height = traits.size
    if scaled and encoding.max_side is not None:
        width, height = (max(1, round(side * encoding.max_side / max(traits.size))) for side in traits.size)
        if traits.format == "JPEG":  # a large one is decoded at a fraction of its size
            source = Image.open(io.BytesIO(data))
            source.draft("RGB", (2 * width, 2 * height))
    rgb = open_image(source, background=encoding.color)
    if scaled:
        turned = encoding.color is not None and traits.orientation >= _FIRST_SIDEWAYS
        rgb = rgb.resize((height, width) if turned else (width, height), Image.Resampling.LANCZOS)
    return encode(rgb, lossy=True, quality=encoding.jpeg_quality or _QUALITY)[1]
