"""Shards of photographs with captions, made from the two that scikit-learn ships; the same on every machine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from tinygptv_ds.data.shards.writer import ShardWriter

_WORDS = ("a", "photo", "of", "the", "old", "red", "flower", "temple", "roof", "tree", "in front of", "people", "water")


def write_photos(folder: Path, size: tuple[int, int], count: int, seed: int = 0) -> Path:
    """Write one shard of `count` JPEGs of `size` (width, height) with captions of 8 to 20 words; return its folder."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    with ShardWriter(folder) as writer:
        for number in range(count):
            encoded = _jpeg(_crop(photos[number % len(photos)], size, rng))
            caption = " ".join(rng.choice(_WORDS, rng.integers(8, 21)))
            writer.write(f"{number:06d}", {"jpg": encoded, "json": json.dumps({"caption": caption}).encode()})
    return folder


def _crop(photo: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return a large random part of the photo with the aspect ratio of `size`, resized to `size`."""
    scale = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.85, 1)
    width, height = (round(side * scale) for side in size)
    left, top = (int(rng.integers(0, free + 1)) for free in (photo.width - width, photo.height - height))
    return photo.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def _jpeg(image: Image.Image) -> bytes:
    """Encode with quality 90 and colors at half the resolution, as cameras and img2dataset do."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()
