"""Pixels of every image mode and size, uint8 up to the device and normalized there, against the original's floats."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD, to_pixels


def test_images(golden: Path) -> None:
    folder = golden / "preprocess"
    known = json.loads((folder / "expected.json").read_bytes())
    expected = load_file(folder / "expected.safetensors")
    assert {name.rpartition(".")[0] for name in expected} == known["images"].keys()
    assert expected
    for name, tensor in expected.items():
        file, _, size = name.rpartition(".")
        encoded = (folder / file).read_bytes()
        pixels = to_pixels(encoded, int(size))
        assert (pixels.dtype, pixels.shape) == ("uint8", (3, int(size), int(size)))
        ours = TinyGPTVForConditionalGeneration.normalize(None, torch.from_numpy(pixels))
        torch.testing.assert_close(ours, tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        for source in (folder / file, Image.open(folder / file)):
            assert (to_pixels(source, int(size)) == pixels).all()


def test_statistics(golden: Path) -> None:
    known = json.loads((golden / "preprocess/expected.json").read_bytes())
    assert (list(IMAGE_MEAN), list(IMAGE_STD)) == (known["mean"], known["std"])
