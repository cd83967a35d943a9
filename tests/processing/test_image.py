"""Files that are no images or too large are refused by name; all others give RGB squares."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.processing import image as images
from tinygptv_ds.processing.image import (
    WHITE,
    ImageError,
    open_image,
    parse_color,
    plain_image,
    read_traits,
    to_pixels,
)


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


# ---- upright and opaque ----------------------------------------------------------------------------------------------


def turned(orientation: int, kind: str, image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image or noise(), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation: int, kind: str) -> None:
    data = turned(orientation, kind)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    upright = open_image(data, background=WHITE)
    assert upright.tobytes() == expected.tobytes()
    assert upright.size == ((40, 60) if orientation > 4 else (60, 40))
    assert np.array_equal(to_pixels(data, 28, background=WHITE), to_pixels(expected, 28))
    assert np.array_equal(to_pixels(data, 10, "fast", background=WHITE), to_pixels(data, 10, "fast")) == (
        orientation == 1 or (kind == "TIFF")  # Pillow turns these in any case
    )


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), "PNG", exif=exif)
    assert open_image(data, background=WHITE).tobytes() == noise().tobytes()


def half_clear(mode: str) -> Image.Image:
    """Return black at the left, transparent black at the right."""
    image = Image.new("RGBA", (40, 40))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    if mode == "P":
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "GIF"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("RGBA", "AVIF"),
        ("RGBA", "TGA"),
        ("RGBA", "JPEG2000"),
    ],
)
@pytest.mark.parametrize("background", [WHITE, (200, 30, 0)])
def test_alpha_is_laid_on_the_background(mode: str, kind: str, background: tuple) -> None:
    options = {"quality": 100} if kind == "AVIF" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(half_clear(mode), kind, **options)
    assert read_traits(data).transparent
    seen = np.asarray(open_image(data, background=background)).astype(int)
    assert np.abs(seen[:, :19]).max() <= 3
    assert np.abs(seen[:, 21:] - background).max() <= 3


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_transparent_color(mode: str) -> None:
    image = Image.new(mode, (8, 8))
    data = encoded(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert np.asarray(open_image(data, background=WHITE)).min() == 255
    assert np.asarray(open_image(data)).max() == 0


@pytest.mark.parametrize("background", [None, WHITE])
@pytest.mark.parametrize(
    ("dtype", "kind", "low", "high"),
    [
        ("<u2", "PNG", 0, 65535),
        ("<u2", "PNG", 0, 4095),  # 12 bits in 16
        ("<u2", "TIFF", 29000, 31000),
        (">u2", "TIFF", 0, 65535),
        ("<u2", "JPEG2000", 0, 65535),
        ("<u2", "PPM", 0, 65535),
        ("<i4", "TIFF", 0, 100_000),
        ("<i4", "TIFF", -70_000, 70_000),
        ("<f4", "TIFF", 0.0, 1.0),
        ("<f4", "TIFF", -3.0e38, 3.0e38),
        ("<f4", "PPM", 0.0, 0.5),
    ],
)
def test_deep_pixels_are_scaled(dtype: str, kind: str, low: float, high: float, background: tuple | None) -> None:
    ramp = np.linspace(low, high, 40 * 60).reshape(40, 60)
    data = encoded(Image.fromarray(ramp.astype(dtype)), kind)
    assert read_traits(data).deep
    gray = np.asarray(open_image(data, background=background).convert("L")).astype(int)
    assert np.abs(gray - np.linspace(0, 255, 40 * 60).reshape(40, 60)).max() <= 1.1
    assert np.array_equal(to_pixels(data, 40), to_pixels(Image.fromarray(gray.astype(np.uint8)), 40))


def test_unsigned_and_inverted_tiffs() -> None:
    """Pillow reads 32 unsigned bits as signed ones, and leaves 16 bits in which white is 0 as they are."""
    values = np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32)
    data = bytearray(encoded(Image.fromarray(values.view(np.int32)), "TIFF"))
    data[data.index(b"\x53\x01\x03\x00\x01\x00\x00\x00") + 8] = 1  # sample format: unsigned
    assert np.asarray(open_image(bytes(data)))[0, :, 0].tolist() == [0, 128, 255]
    ramp = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    data = bytearray(encoded(ramp, "TIFF"))
    place = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00")  # photometric interpretation: black is 0
    data[place + 8] = 0
    assert np.asarray(open_image(bytes(data)))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("values", "shade"),
    [(np.full((4, 4), 65535, "<u2"), 255), (np.full((4, 4), 0, "<u2"), 0), (np.full((4, 4), 0.5, "<f4"), 128)],
)
def test_one_shade_has_no_range(values: np.ndarray, shade: int) -> None:
    assert abs(int(np.asarray(open_image(encoded(Image.fromarray(values), "TIFF"))).max()) - shade) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    values = np.zeros((4, 4), "<f4")
    values[1, 1] = value
    with pytest.raises(ImageError, match="not finite") as caught:
        to_pixels(encoded(Image.fromarray(values), "TIFF"), 28)
    assert caught.value.reason == "unsupported_depth"


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "QOI", "DDS", "JPEG2000", "AVIF"])
def test_rare_formats_are_decoded_by_content(kind: str) -> None:
    data = encoded(noise(), kind, **({"sizes": [(60, 40)]} if kind == "ICO" else {}))
    assert to_pixels(data, 28).std() > 20
    assert read_traits(data).format == kind


def test_a_tga_without_a_signature() -> None:
    data = encoded(noise(), "TGA")[:-26]
    assert open_image(data).tobytes() == noise().tobytes()
    with pytest.raises(DataError, match="none of"):
        open_image(data[:-1])


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "unsupported_image", "SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported_image", "pip install pillow-heif"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "unsupported_image", "a video"),
        (b"\xff\x0a" + bytes(100), "unsupported_image", "JPEG XL"),
        (b"II*\0" + bytes(100), "unsupported_image", "TIFF"),
        (b"<!DOCTYPE html><html>404", "corrupt_image", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "corrupt_image", "git lfs pull"),
        (b"", "corrupt_image", "empty"),
    ],
)
def test_what_is_not_decoded_is_named(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        to_pixels(data, 28)
    assert caught.value.reason == reason


def test_a_damaged_heic_is_not_blamed_on_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_heif_is_there", lambda: True)
    monkeypatch.setattr(images, "RARE_FORMATS", ())
    with pytest.raises(ImageError, match="a damaged HEIC"):
        to_pixels(b"\0\0\0\x18ftypheic" + bytes(100), 28)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    data = encoded(noise("L"), kind, save_all=True, append_images=[Image.new("L", (60, 40))])
    assert read_traits(data).animated
    assert to_pixels(data, 28).std() > 10


def test_a_plain_image_is_what_any_reader_sees() -> None:
    plain = {"PNG": encoded(noise(), "PNG"), "JPEG": turned(1, "JPEG")}
    for kind, data in plain.items():
        assert plain_image(data, WHITE) == ({"PNG": "png", "JPEG": "jpg"}[kind], data)
    odd = [turned(6, "PNG"), encoded(half_clear("RGBA"), "PNG"), encoded(noise(), "TGA")]
    odd.append(encoded(Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3)), "PNG"))
    for data in odd:
        suffix, changed = plain_image(data, WHITE)
        assert (suffix, changed[:4]) == ("png", b"\x89PNG")
        assert open_image(changed).tobytes() == open_image(data, background=WHITE).tobytes()
    suffix, changed = plain_image(turned(6, "JPEG", Image.radial_gradient("L").convert("RGB")), WHITE)
    assert (suffix, changed[:2], open_image(changed).size) == ("jpg", b"\xff\xd8", (256, 256))


def test_colors() -> None:
    assert (parse_color("white"), parse_color("#0080ff")) == (WHITE, (0, 128, 255))
    for text in ("whyte", "", "#ff000080", "#12"):
        with pytest.raises(ConfigError, match="is no color"):
            parse_color(text)
