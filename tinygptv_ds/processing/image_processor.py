"""The part of the processor that reads images, as an image processor of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature

from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD, to_pixels
from tinygptv_ds.processing.processor_inputs import ImageInput, as_image, flat_images


class TinyGPTVImageProcessor(BaseImageProcessor):
    """Images to uint8 pixels, which the model normalises itself, on its device.

    Args:
        image_size: side of the square result.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads this class attribute

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = {"height": image_size, "width": image_size}
        self.image_mean, self.image_std = list(IMAGE_MEAN), list(IMAGE_STD)
        self.do_resize, self.do_normalize, self.do_rescale = True, False, False
        self.resample = 3  # bicubic

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
