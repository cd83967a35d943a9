"""Images that users show are read upright and opaque, unless they ask for the original's way."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from helpers.turned import turned_image

from tinygptv_ds.apps.chat import load_image
from tinygptv_ds.apps.serve.request_images import ImageLimits, _decode
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments
from tinygptv_ds.processing.image import parse_background


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


def test_a_background_that_is_no_color_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="'whyte' is no color"):
        check_model_arguments(parser.parse_args([str(tmp_path / "model"), "--background", "whyte"]))
