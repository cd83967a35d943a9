"""Files that are no images or too large are refused by name; all others give RGB squares."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import open_image, to_pixels


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).convert(mode)


def claims_to_be(width: int, height: int) -> bytes:
    """Return a PNG header of this size without pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_kinds_and_modes(kind: str, mode: str) -> None:
    image = noise(mode)
    data = encoded(image if kind != "JPEG" or mode != "P" else image.convert("L"), kind)
    pixels = to_pixels(data, 28)
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 28, 28), np.uint8, True)


def test_alpha_is_dropped_and_rotation_ignored() -> None:
    opaque = noise()
    clear = opaque.copy()
    clear.putalpha(0)
    assert (to_pixels(encoded(clear, "PNG"), 28) == to_pixels(encoded(opaque, "PNG"), 28)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert open_image(encoded(opaque, "JPEG", exif=exif)).size == opaque.size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_cut_short(kind: str, keep: float) -> None:
    data = encoded(noise(), kind)
    with pytest.raises(DataError, match="cannot be decoded"):
        to_pixels(data[: int(len(data) * keep)], 28)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", claims_to_be(5, 5)])
def test_no_image(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        to_pixels(data, 28)


@pytest.mark.parametrize("size", [(20_000, 5_001), (2**31 - 1, 2**31 - 1)])
def test_a_huge_image_is_refused_by_its_header(size: tuple[int, int]) -> None:
    """Decoding the image would exhaust the machine's memory."""
    with pytest.raises(DataError, match=r"refused|decoded"):
        to_pixels(claims_to_be(*size), 28)


def test_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.jpg: the image cannot be decoded"):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"none\.jpg"):
        open_image(tmp_path / "none.jpg")
