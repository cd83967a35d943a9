"""Images that users show are read upright and opaque, unless they ask for the original's way."""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from helpers.turned import turned_image
from PIL import Image

from tinygptv_ds.apps.chat import load_image
from tinygptv_ds.apps.serve.request_images import ImageLimits, _decode
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments
from tinygptv_ds.processing.image import WHITE, parse_background, to_pixels


@pytest.mark.parametrize(
    ("color", "size", "corner"), [("white", (20, 40), 255), ("#800000", (20, 40), 128), ("none", (40, 20), 0)]
)
def test_chat_and_server_read_upright_images(color: str, size: tuple, corner: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(turned_image((0, 0, 0)))
    background = parse_background(color)
    seen = load_image(str(tmp_path / "a.png"), background=background)
    assert (seen.size, seen.getpixel((size[0] - 1, size[1] - 1))[0]) == (size, corner)
    served = np.asarray(_decode(turned_image((0, 0, 0)), 28, ImageLimits(1, 10**6, 10**6, background=background)))
    assert served[27, 27, 0] == corner
    assert served[0, 27, 0] == (0 if size == (20, 40) else corner)


def test_a_jpeg_above_the_servers_limit_is_decoded_at_reduced_size() -> None:
    """As training's "fast" decoding does it; what cannot be is refused with the remedy."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (400, 300), Image.Resampling.BICUBIC
    )
    limits, forms = ImageLimits(1, 10**6, 90_000), {}
    for name, options in {"jpg": {}, "progressive": {"progressive": True}, "png": {}}.items():
        photo.save(file := io.BytesIO(), "PNG" if name == "png" else "JPEG", **options)
        forms[name] = file.getvalue()
    reduced = np.asarray(_decode(forms["jpg"], 28, limits))
    assert np.array_equal(reduced.transpose(2, 0, 1), to_pixels(forms["jpg"], 28, "fast", background=WHITE))
    exact = np.asarray(_decode(forms["jpg"], 28, ImageLimits(1, 10**6, 120_000)))
    assert 0 < np.abs(reduced.astype(int) - exact).mean() < 8
    for encoded, side in ((forms["progressive"], 28), (forms["png"], 28), (forms["jpg"], 200)):
        with pytest.raises(DataError, match="400 x 300 pixels is above the limit of 90,000; send it smaller"):
            _decode(encoded, side, limits)


def test_a_background_that_is_no_color_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="'whyte' is no color"):
        check_model_arguments(parser.parse_args([str(tmp_path / "model"), "--background", "whyte"]))
