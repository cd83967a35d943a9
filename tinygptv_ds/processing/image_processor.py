"""The part of the processor that reads images, as an image processor of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature

from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD, to_pixels
from tinygptv_ds.processing.processor_inputs import ImageInput, as_image, flat_images
from tinygptv_ds.remote_code import AUTO_MAPS, SavedWithCode

_FIXED = {
    "do_resize": True,
    "do_rescale": False,
    "do_normalize": False,
    "resample": 3,  # bicubic
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}


class TinyGPTVImageProcessor(SavedWithCode, BaseImageProcessor):
    """Images to uint8 pixels, which the model normalises itself, on its device.

    It is a part of the processor, and `AutoImageProcessor` loads it alone from an exported folder.

    Args:
        size: side of the square result; also as transformers spells it, `{"height": 224, "width": 224}`.
        settings: those that transformers saves with it. The model is computed with one value of each.

    Raises:
        ValueError: the size is no square, or a setting has another value.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads this class attribute

    def __init__(self, size: int | dict[str, int] = 224, **settings: Any) -> None:
        for name, value in _FIXED.items():
            if settings.setdefault(name, value) != value:
                raise ValueError(f"{name}={settings[name]!r}: only {value!r}, as the model was trained with it")
        super().__init__(**settings)
        sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
        side = sides.pop()
        if sides or not isinstance(side, int) or side < 1:
            raise ValueError(f'size={size!r}: a side, or {{"height": N, "width": N}} with one N')
        self.size = {"height": side, "width": side}
        self.auto_map = dict(AUTO_MAPS["TinyGPTVImageProcessor"])

    def preprocess(self, images: Any, return_tensors: str = "pt") -> BatchFeature:
        """Return `pixel_values`, uint8 `[N, 3, S, S]`, of an image or lists of images; errors as in the processor."""
        pixels = self.pixels(flat_images(images))
        return BatchFeature({"pixel_values": pixels.numpy() if return_tensors == "np" else pixels})

    def pixels(self, images: list[ImageInput]) -> torch.Tensor:
        """Return uint8 `[N, 3, S, S]`."""
        size = self.size["height"]
        if not images:
            return torch.empty(0, 3, size, size, dtype=torch.uint8)
        taken = [as_image(image, size) for image in images]
        return torch.from_numpy(np.stack([p if isinstance(p, np.ndarray) else to_pixels(p, size) for p in taken]))
