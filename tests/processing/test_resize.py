"""The resize is Pillow's, value for value."""

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinygptv_ds.processing import resize as module
from tinygptv_ds.processing.resize import resize

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 700))
SIZES = st.sampled_from([1, 14, 28, 84, 224, 448])
BICUBIC = Image.Resampling.BICUBIC


def image(height: int, width: int, kind: str, seed: int) -> np.ndarray:
    """Return uint8 `[H, W, 3]`: "noise", or black and white "edges", which overshoot most."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return noise if kind == "noise" else np.where(noise > 127, np.uint8(255), np.uint8(0))


def packed(pixels: np.ndarray) -> np.ndarray:
    """Pack the pixels, with arbitrary values in the unused bits."""
    filled = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 0xA5, np.uint8)], axis=2)
    return filled.view("<u4")[..., 0]


def by_pillow(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize one axis at a time, so that the order does not depend on Pillow's version."""
    height, width = pixels.shape[:2]
    height_first = height > size and height - size > 2 * max(width - size, 0)
    between = (width, size) if height_first else (size, height)
    resized = Image.fromarray(pixels).resize(between, BICUBIC).resize((size, size), BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES, st.sampled_from(["noise", "edges"]), st.integers(0, 99))
def test_every_value_is_pillows(height: int, width: int, size: int, kind: str, seed: int) -> None:
    pixels = image(height, width, kind, seed)
    ours = resize(packed(pixels), size)
    assert (ours.dtype, ours.shape, ours.flags.c_contiguous) == (np.uint8, (3, size, size), True)
    assert np.array_equal(ours, by_pillow(pixels, size))


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="earlier ones go along the width first always")
@pytest.mark.parametrize("width", [20, 27, 28, 29, 40, 57, 112])
def test_the_order_of_the_axes_is_pillow_13s(width: int) -> None:
    """The sizes are around the height from which Pillow resizes along the height first."""
    turn = max(28, 28 + 2 * (width - 28))
    for height in (turn - 1, turn, turn + 1, turn + 2):
        pixels = image(height, width, "edges", height)
        expected = np.asarray(Image.fromarray(pixels).resize((28, 28), BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(resize(packed(pixels), 28), expected)


def test_the_order_of_the_axes_counts() -> None:
    """The two orders differ; otherwise the test above would pass with either."""
    pixels = image(100, 28 + 7, "edges", 0)
    other = Image.fromarray(pixels).resize((28, 100), BICUBIC).resize((28, 28), BICUBIC)
    assert not np.array_equal(resize(packed(pixels), 28), np.asarray(other).transpose(2, 0, 1))


def test_it_needs_no_place_to_keep_its_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resize works in a container whose file system is read-only."""

    def no_place(signature: str, cache: bool = False) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature)

    njit = module.njit
    monkeypatch.setattr(module, "njit", no_place)
    double = module._compiled("int64(int64)")(lambda x: 2 * x)
    assert double(21) == 42
