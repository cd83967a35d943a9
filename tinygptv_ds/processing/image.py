"""Encoded images to uint8 pixels: exactly as the original's transform sees them, or upright and opaque.

RGB, resized to a square bicubically without keeping the aspect ratio. The original then converts to floats and
normalizes; here pixels stay uint8 until they are on the device (`TinyGPTVForConditionalGeneration.normalize`).

An image is read in one of two ways, which `background` decides. None: as in the original, which drops alpha and ignores
the EXIF orientation. A color: turned upright by the orientation, and laid on this color where it is transparent.
Of an animation, the first frame counts. Pixels of more than 8 bits are scaled to 8 in both ways.

Pillow reads every header and reports errors. Ordinary JPEGs are decoded by simplejpeg, whose libjpeg-turbo gives
Pillow's own values sooner; files that it refuses or warns about are decoded by Pillow.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.processing.image_formats import (
    FORMATS,
    HEIC,
    MAX_PIXELS,
    RARE_FORMATS,
    foreign_format,
    looks_like_tga,
    no_image_because,
)
from tinygptv_ds.processing.image_limits import (
    EncodedImage,
    ImageError,
    check_before_opening,
    check_scans,
    exif_is_small,
)

Source = bytes | str | Path | Image.Image  # encoded, a path, or decoded
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
NO_BACKGROUND = "none"
# CLIP's statistics, which BLIP-2's image processor normalises with, and here the model.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_SUFFIXES |= {"AVIF": "avif", "JPEG2000": "jp2", "PPM": "ppm"}
_LOSSY = ("JPEG", "MPO", "HEIF")  # of such images, another generation of JPEG loses nothing that could be seen
_QUALITY = 95  # of JPEGs that are encoded again
# orientation of EXIF -> turn of an array [H, W, ...]; 6 is the usual one of a phone held upright
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_SAMPLE_FORMAT, _PHOTOMETRIC, _WHITE_IS_ZERO = 339, 262, 0  # tags of TIFF, and a value of the latter
_STRIP = 1024  # rows


@dataclass(frozen=True)
class ImageTraits:
    """What the header of an image says.

    Attributes:
        format: Pillow's name of it.
        size: width and height as stored, in pixels.
        orientation: of EXIF, 1 to 8; 1 is upright.
        transparent: whether there is an alpha channel or a transparent color.
        deep: whether pixels have more than 8 bits a channel as Pillow reads them.
        animated: whether there are several frames or pages.
    """

    format: str
    size: tuple[int, int]
    orientation: int
    transparent: bool
    deep: bool
    animated: bool


def open_image(source: Source, *, background: Color | None = None) -> Image.Image:
    """Decode to RGB.

    Args:
        source: the image.
        background: None: as in the original; a color: upright, on this color (see this module).

    Raises:
        ImageError: not an image, cut short, above 100 megapixels by its header, or of a format that is not decoded.
    """
    with _refusals(source):
        return _rgb(_open(source)[0], background)


def read_image_size(source: Source) -> tuple[int, int]:
    """Read width and height as stored from the header, without decoding; errors as in `open_image`."""
    with _refusals(source):
        return _open(source)[0].size


def can_be_reduced(source: Source) -> bool:
    """Return whether `to_pixels` with "fast" decoding never holds all pixels of an image; errors as in `open_image`.

    It is so for JPEGs whose pixels follow each other in one scan; progressive ones are kept whole while decoding.
    """
    with _refusals(source):
        image, _ = _open(source)
        return image.format == "JPEG" and image.mode in ("RGB", "L") and not image.info.get("progressive")


def read_traits(source: Source) -> ImageTraits:
    """Read what the header says, without decoding; errors as in `open_image`."""
    with _refusals(source):
        image, _ = _open(source)
        return ImageTraits(
            image.format or "",
            image.size,
            _orientation(image),
            image.has_transparency_data,
            image.mode in _DEEP_MODES,
            image.format != "MPO" and _animated(image),  # its other frames are depth or a preview
        )


def to_pixels(
    source: Source, image_size: int, decoding: str = "exact", *, background: Color | None = None
) -> np.ndarray:
    """Decode and resize to uint8 `[3, image_size, image_size]`; errors as in `open_image`.

    Args:
        source: the image.
        image_size: side of the result.
        decoding: "exact": the values that Pillow gives. "fast": JPEGs of at least twice `image_size` are decoded at
            half their size or less and then resized; photos differ by 1 to 3 of 255 on average, fine stripes by more.
        background: None: as in the original; a color: upright, on this color (see this module).
    """
    with _refusals(source):
        image, encoded = _open(source)
        packed = None
        if image.format == "JPEG" and image.mode in ("RGB", "L") and encoded is not None:
            packed = _decode_jpeg(encoded, image.size, image_size if decoding == "fast" else None)
            turn = None if packed is None or background is None else _TURNS.get(_orientation(image))
            if packed is not None and turn is not None:
                packed = np.ascontiguousarray(turn(packed))
        if packed is None:
            packed = _pack(_rgb(image, background))
    if packed.shape == (image_size, image_size):
        return _planes(packed)
    from tinygptv_ds.processing.resize import resize  # importing numba takes a second, and only resizing needs it

    return resize(packed, image_size)


def plain_image(encoded: bytes, background: Color) -> tuple[str, bytes]:
    """Return (file name ending, bytes) of an image that any reader sees as `open_image` does with `background`.

    The bytes are unchanged where the image is upright, opaque, of 8 bits and of a usual format. A JPEG or HEIC is
    encoded again as JPEG (quality 95, full color resolution), any other as PNG. Errors as in `open_image`.
    """
    traits = read_traits(encoded)
    if traits.format in _SUFFIXES and traits.orientation == 1 and not traits.transparent and not traits.deep:
        return _SUFFIXES[traits.format], encoded
    return encode(open_image(encoded, background=background), lossy=traits.format in _LOSSY)


def encode(image: Image.Image, *, lossy: bool, quality: int = _QUALITY) -> tuple[str, bytes]:
    """Return (file name ending, bytes) of an RGB image as JPEG without color subsampling, or as PNG."""
    out = io.BytesIO()
    if lossy:
        image.save(out, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(out, "PNG")
    return "jpg" if lossy else "png", out.getvalue()


def stored_suffix(format: str) -> str | None:
    """Return the file name ending of a format that shards store as it is, by Pillow's name; None for others."""
    return _SUFFIXES.get(format)


def parse_color(text: str) -> Color:
    """Return the color of a name or ``#rrggbb``.

    Raises:
        ConfigError: it is none, or not opaque.
    """
    with contextlib.suppress(ValueError):
        color = ImageColor.getrgb(text)
        if len(color) == 3:
            return color
    raise ConfigError(f"{text!r} is no color; give a name, e.g. white, or red, green and blue as #rrggbb")


def parse_background(text: str) -> Color | None:
    """Return the color of a name or ``#rrggbb``, or None for ``none``: images as in the original.

    Raises:
        ConfigError: it is neither.
    """
    return None if text == NO_BACKGROUND else parse_color(text)


@contextmanager
def _refusals(source: Source) -> Iterator[None]:
    """Raise ImageError for anything that goes wrong with an image: Pillow's readers raise exceptions of many kinds."""
    try:
        yield
    except Exception as error:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        if isinstance(error, ImageError):
            raise ImageError(error.reason, f"{name}{error}") from error
        unrecognised = isinstance(error, UnidentifiedImageError)
        why = f"it is none of {', '.join(FORMATS)}" if unrecognised else str(error) or type(error).__name__
        raise ImageError("corrupt_image", f"{name}the image cannot be decoded: {why}") from error


def _open(source: Source) -> tuple[Image.Image, bytes | None]:
    """Return the image with only its header read, and its bytes where it is not decoded yet."""
    if isinstance(source, Image.Image):
        return source, None
    encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
    check_before_opening(encoded)
    try:
        image: Image.Image = Image.open(file := EncodedImage(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        image = _open_rare(file := EncodedImage(encoded), encoded)
    file.allow_data(image.format)
    if not 0 < image.width * image.height <= MAX_PIXELS:
        message = f"an image of {image.width} x {image.height} pixels is refused (limit {MAX_PIXELS:,})"
        raise ImageError("corrupt_image", message)
    if image.info.get("progressive"):
        check_scans(encoded, *image.size)
    return image, encoded


def _open_rare(file: EncodedImage, encoded: bytes) -> Image.Image:
    """Open an image of a rare format, or raise the ImageError that says what the file is."""
    formats = [name for name in RARE_FORMATS if name != "HEIF" or _heif_is_there()]
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(file, formats=[*formats, *(["TGA"] if looks_like_tga(encoded) else [])])
    foreign = foreign_format(encoded)
    if foreign == HEIC and _heif_is_there():
        raise ImageError("corrupt_image", "the image cannot be decoded: it is a damaged HEIC")
    if foreign is not None:
        raise ImageError("unsupported_image", f"the image cannot be decoded: it is {foreign}")
    cause = no_image_because(encoded)
    if cause is not None:
        raise ImageError("corrupt_image", f"the image cannot be decoded: {cause}")
    raise UnidentifiedImageError


@lru_cache(maxsize=1)
def _heif_is_there() -> bool:
    """Register pillow-heif with Pillow, where that is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _animated(image: Image.Image) -> bool:
    """Return whether there is a second frame; one that comes after too many blocks does not count."""
    try:
        return getattr(image, "is_animated", False)
    except ImageError:
        return False


def _orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF, 1 to 8; only looked for where the header brought any metadata."""
    if not {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys() and image.format != "TIFF":
        return 1
    if not exif_is_small(image.info.get("exif")):
        return 1
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's reader of EXIF raises many kinds; the pixels do not depend on it
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb(image: Image.Image, background: Color | None) -> Image.Image:
    """Decode with Pillow to RGB, in the way that `background` says."""
    image.load()  # some readers know transparency, and TIFF's turns the image upright, only now
    turn = None if background is None else _TURNS.get(_orientation(image))
    if image.mode in _DEEP_MODES:
        image = _scaled(image)
    if image.mode == "LAB":
        raise ImageError("unsupported_image", "the image cannot be decoded: its colors are stored as LAB")
    if background is not None and image.has_transparency_data:
        flat = Image.new("RGBA", image.size, (*background, 255))
        flat.alpha_composite(image.convert("RGBA"))
        image = flat
    rgb = image.convert("RGB")
    return rgb if turn is None else Image.fromarray(np.ascontiguousarray(turn(np.asarray(rgb))))


def _scaled(image: Image.Image) -> Image.Image:
    """Scale gray values of 16 or 32 bits or floats to 8 bits, the lowest value to 0 and the highest to 255.

    Pillow's own conversion cuts them off at 255, so that nearly all pixels become white. What range a file uses it
    does not say: cameras and scanners store 10 to 14 bits in 16.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,)) in (1, (1,)) and tags:
        values = values.view(np.uint32)  # Pillow hands unsigned integers out as signed ones
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        message = "the image cannot be scaled to 8 bits: it holds values that are not finite (NaN or infinity)"
        raise ImageError("unsupported_depth", message)
    gray = np.empty(values.shape, dtype=np.uint8)
    for first in range(0, len(values), _STRIP):  # bounds the memory of a large image
        strip = values[first : first + _STRIP].astype(np.float64)
        if high > low:
            gray[first : first + _STRIP] = np.rint((strip / 2 - low / 2) * (255 / (high / 2 - low / 2)))
        else:  # one shade all over, which has no range
            top = 65535 if image.mode.startswith("I;16") or low > 255 else 1 if image.mode == "F" and low <= 1 else 255
            gray[first : first + _STRIP] = np.clip(255 * low / top, 0, 255)
    return Image.fromarray(255 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else gray)


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


def _pack(rgb: Image.Image) -> np.ndarray:
    """Return an RGB image as uint32 `[H, W]` as `resize` takes it."""
    raw = rgb.tobytes("raw", "RGBX")
    return np.frombuffer(raw, "<u4").reshape(rgb.height, rgb.width).copy()  # compiled code needs a writable array


def _planes(packed: np.ndarray) -> np.ndarray:
    """Split uint32 `[H, W]` into uint8 `[3, H, W]`: red, green and blue."""
    planes = np.empty((3, *packed.shape), np.uint8)
    for channel, plane in enumerate(planes):
        plane[:] = packed >> 8 * channel
    return planes
