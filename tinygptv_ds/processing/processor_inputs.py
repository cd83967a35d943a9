"""What callers of a processor of transformers pass: text and images in either order, arrays and tensors, padding."""

from __future__ import annotations

import base64
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tinygptv_ds.errors import DataError

ImageInput = bytes | str | Path | Image.Image | np.ndarray | Tensor  # encoded, a path, decoded, or from `to_pixels`
_FETCH_SECONDS = 20
_SHORTEST_BASE64 = 64  # characters; the smallest image files are longer, file names mostly shorter
Images = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None


def in_order(images: Any, text: Any) -> tuple[Images, list[str]]:
    """Return images and prompts, whichever of the two was given first; text alone may be in either place."""
    if _is_text(images) and text is not None and not _is_text(text) and not isinstance(text, Path):
        images, text = text if _given(text) else None, images
    return images, [text] if isinstance(text, str) else list(text or ())


def flat_images(images: Images) -> list[ImageInput]:
    """Return the images of an image, a list of images, or lists of them; a tensor `[N, 3, H, W]` is N images."""
    if images is None:
        return []
    if isinstance(images, ImageInput):
        several = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
        return list(images) if several else [images]  # type: ignore[arg-type]  # only those have several
    return [image for each in images for image in flat_images(each)]


def as_image(image: ImageInput, size: int) -> bytes | str | Path | Image.Image | np.ndarray:
    """Return an image that `to_pixels` takes, or the pixels `[3, size, size]` that the model takes.

    A text is a path, an http(s) URL, which is fetched, or base64 with or without `data:image/...;base64,` before it.
    Arrays and tensors are `[H, W, 3]`, `[3, H, W]` or, in gray, `[H, W]`: uint8, or floats from 0 to 1. Other floats of
    shape `[3, size, size]` are pixels that are normalised already.

    Raises:
        DataError: an array has another shape or range, or a URL cannot be fetched.
    """
    if isinstance(image, str):
        return _from_text(image)
    if not isinstance(image, np.ndarray | Tensor):
        return image
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    in_range = array.size > 0 and array.min() >= 0 and array.max() <= 1
    normalised = np.issubdtype(array.dtype, np.floating) and not in_range and np.isfinite(array).all()
    if array.shape == (3, size, size) and (array.dtype == np.uint8 or normalised):
        return array
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    floats = np.issubdtype(array.dtype, np.floating) and in_range
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not (array.dtype == np.uint8 or floats):
        raise DataError(
            f"an image of shape {list(array.shape)} in {array.dtype}; arrays and tensors must be [H, W, 3] or [3, H, W]"
            " in uint8, or floats from 0 to 1"
        )
    return Image.fromarray(np.rint(array * 255).astype(np.uint8) if floats else array)


def _from_text(text: str) -> bytes | str:
    if text.startswith(("http://", "https://")):
        request = urllib.request.Request(text, headers={"User-Agent": "Mozilla/5.0 (tinygptv)"})
        try:
            with urllib.request.urlopen(request, timeout=_FETCH_SECONDS) as answer:
                return answer.read()
        except OSError as error:
            raise DataError(f"{text} cannot be fetched: {error}") from None
    _, comma, data = text.partition(",") if text.startswith("data:") else ("", "", text)
    if not comma and (len(text) < _SHORTEST_BASE64 or os.path.exists(text)):  # noqa: PTH110 - too long for a Path
        return text
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        return text  # a path that does not exist


def cut_rows(rows: list[list[int]], limit: int | None, image_token_id: int) -> list[list[int]]:
    """Return token rows of at most `limit` tokens, cut at their ends.

    Raises:
        DataError: an image would be cut off.
    """
    if limit is None:
        return rows
    if any(image_token_id in row[limit:] for row in rows):
        raise DataError(f"max_length={limit} would cut off an image; take a larger one, or shorten the text before it")
    return [row[:limit] for row in rows]


def padded_length(
    rows: list[list[int]], padding: bool | str, max_length: int | None, multiple_of: int | None = None
) -> int:
    """Return the length that rows are padded to, a multiple of `multiple_of` where they are padded.

    Raises:
        ValueError: `padding` is unknown, or rows of unequal lengths are not to be padded.
    """
    longest = max(map(len, rows), default=0)
    step = multiple_of or 1
    if padding in (True, "longest"):
        return -(-longest // step) * step
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        return -(-max(max_length, longest) // step) * step
    if padding not in (False, "do_not_pad"):
        raise ValueError(f"padding={padding!r}: True, 'longest', 'max_length' or False")
    if any(len(row) != longest for row in rows):
        raise ValueError(
            "padding=False: prompts of unequal lengths make no tensor; leave it out, or pass one at a time"
        )
    return longest


def padded_offsets(offsets: list[list[tuple[int, int]]], length: int, side: str) -> list[list[tuple[int, int]]]:
    """Pad the offsets of rows, "left" or "right", as the rows are."""
    empty = [[(0, 0)] * (length - len(each)) for each in offsets]
    pairs = zip(offsets, empty, strict=True)
    return [each + rest if side == "right" else rest + each for each, rest in pairs]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(each, str) for each in value)
    )


def _given(value: Any) -> bool:
    return not (isinstance(value, list | tuple) and not value)
