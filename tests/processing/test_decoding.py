"""JPEGs decoded without Pillow equal Pillow's; those decoded at a reduced size are close to them."""

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from tinygptv_ds.errors import DataError
from tinygptv_ds.processing import image as images
from tinygptv_ds.processing.image import open_image, to_pixels

FLOWER = load_sample_images().images[1]
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 427))


def encoded(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def part(width: int, height: int, mode: str = "RGB", left: int = 100) -> Image.Image:
    """Return a part of a photo."""
    return Image.fromarray(FLOWER[:height, left : left + width]).convert(mode)


def by_pillow(data: bytes, size: int) -> np.ndarray:
    resized = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    target=st.sampled_from([28, 84, 224, 448]),
    mode=st.sampled_from(["RGB", "RGB", "L"]),
    options=st.fixed_dictionaries(
        {
            "quality": st.sampled_from([5, 50, 75, 90, 100]),
            "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
            "progressive": st.booleans(),
            "optimize": st.booleans(),
            "restart_marker_blocks": st.sampled_from([0, 3]),
        }
    ),
    turned=st.booleans(),
)
def test_ordinary_jpegs(size: tuple[int, int], target: int, mode: str, options: dict, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, which nobody does
    data = encoded(part(*size, mode), **options, exif=exif if turned else b"")
    # Pillow cut off here: what comes out is simplejpeg's.
    assert images._decode_jpeg(data, size, None) is not None
    # a height that shrinks more than the width is test_resize's matter, for it depends on Pillow's version
    height_first = size[1] > target and size[1] - target > 2 * max(size[0] - target, 0)
    if not height_first:
        assert np.array_equal(to_pixels(data, target), by_pillow(data, target))
    whole = images._decode_jpeg(data, size, None)
    rgb = whole.view(np.uint8).reshape(*whole.shape, 4)[..., :3]
    assert np.array_equal(rgb, np.asarray(open_image(data)))


def test_colours_stored_as_rgb() -> None:
    data = encoded(part(50, 40), keep_rgb=True)
    assert b"Adobe" in data
    assert images._decode_jpeg(data, (50, 40), None) is not None
    assert np.array_equal(to_pixels(data, 28), by_pillow(data, 28))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_of_the_right_size(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not resized: the dataloader workers and ranks of prepared images do without numba, which takes a second."""
    data = encoded(part(84, 84, mode))
    monkeypatch.delitem(sys.modules, "tinygptv_ds.processing.resize", raising=False)
    assert np.array_equal(to_pixels(data, 84), by_pillow(data, 84))
    assert "tinygptv_ds.processing.resize" not in sys.modules


def with_stray_bytes(data: bytes) -> bytes:
    """Insert two bytes between two segments of the header, about which libjpeg warns."""
    return data.replace(b"\xff\xdb", b"\xff\xfe\x00\x04hm\xff\xdb", 1)


OTHERS = {
    "cmyk": encoded(part(50, 40, "CMYK")),
    "comment": with_stray_bytes(encoded(part(50, 40))),
    "bytes after the end": encoded(part(50, 40)) + b"more",
    "no end": encoded(part(50, 40))[:-2],
    "two images": encoded(part(50, 40)) + encoded(part(20, 20)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_odd_jpegs_are_as_pillow_says(name: str) -> None:
    try:
        expected = by_pillow(OTHERS[name], 28)
    except OSError:
        with pytest.raises(DataError, match="cannot be decoded"):
            to_pixels(OTHERS[name], 28)
    else:
        assert np.array_equal(to_pixels(OTHERS[name], 28), expected)


def test_cmyk_and_strict_cuts_go_to_pillow() -> None:
    assert images._decode_jpeg(OTHERS["no end"], (50, 40), None) is None
    assert images._decode_jpeg(encoded(part(50, 40))[:-200], (50, 40), None) is None
    # a header that Pillow and libjpeg read differently
    assert images._decode_jpeg(encoded(part(50, 40)), (50, 41), None) is None


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("decoding", ["exact", "fast"])
def test_a_cut_jpeg_has_pillows_error(keep: float, decoding: str) -> None:
    data = encoded(part(200, 150))
    data = data[: int(len(data) * keep)]
    with pytest.raises(DataError) as by_opening:
        open_image(data)
    with pytest.raises(DataError) as by_pixels:
        to_pixels(data, 28, decoding)
    assert str(by_pixels.value) == str(by_opening.value)
    assert "truncated" in str(by_pixels.value)


# ---- fast ------------------------------------------------------------------------------------------------------------


def test_fast_is_near() -> None:
    """Two photos, one of them with much fine detail, are decoded at a half, a quarter and an eighth of their size."""
    apart = []
    for photo in load_sample_images().images:
        data = encoded(Image.fromarray(photo), quality=90)
        for target in (200, 100, 50, 28):
            apart.append(np.abs(to_pixels(data, target, "fast").astype(int) - to_pixels(data, target)).mean())
    assert min(apart) > 0 and max(apart) < 6
    assert np.mean(apart) < 3


@pytest.mark.parametrize(("width", "height"), [(170, 167), (167, 400), (84, 84), (30, 20)])
def test_fast_is_exact_below_twice_the_target(width: int, height: int) -> None:
    data = encoded(part(width, height))
    assert np.array_equal(to_pixels(data, 84, "fast"), to_pixels(data, 84))


@pytest.mark.parametrize(("source", "decoded"), [(168, 84), (335, 84), (337, 85), (426, 107)])
def test_fast_decodes_to_no_less_than_the_target(source: int, decoded: int) -> None:
    data = encoded(part(source, source))
    assert images._decode_jpeg(data, (source, source), 84).shape == (decoded, decoded)


def test_fast_leaves_other_kinds_alone() -> None:
    out = io.BytesIO()
    part(200, 200).save(out, "PNG")
    assert np.array_equal(to_pixels(out.getvalue(), 28, "fast"), to_pixels(out.getvalue(), 28))
