"""Runs the frozen vision path over the images of shards, and writes its outputs as shards of features."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.index import build_index
from tinygptv_ds.data.shards.members import SKIPPED
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.data.shards.writer import add_sample, open_tar
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.files import whole_file
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import Color, to_pixels
from tinygptv_ds.processing.image_limits import ImageError

_OF_THE_STORAGE = ("unreadable", "unreadable_shard", "truncated")  # another time the sample may be whole


@dataclass(frozen=True)
class Slot:
    """One sample of a shard, in pixels.

    Attributes:
        key: of the sample.
        members: by suffix, what is kept next to the features: `json` as it is, and `skipped.json` where it is unusable.
        pixels: uint8 `[n, 3, S, S]`.
        skipped: why it is unusable, in one word; None where it is not.
    """

    key: str
    members: dict[str, bytes]
    pixels: np.ndarray
    skipped: str | None = None


class ImageChunks(Dataset):
    """Maps a number to (which tar, first sample, slots): chunks of the samples of all tars in order, each of one tar.

    Args:
        tars: the shards.
        counts: samples of each.
        size: samples of a chunk.
        image_size: side of the square images.
        cache: where remote shards are fetched to.
        background: how images are read, see processing/image.py.
    """

    def __init__(
        self,
        tars: Sequence[Shard],
        counts: Sequence[int],
        size: int,
        image_size: int,
        cache: ShardCache,
        background: Color | None = None,
    ) -> None:
        self._background = background
        self._tars, self._counts, self._size, self._image_size = tars, counts, size, image_size
        self._starts = np.cumsum([0, *(-(-count // size) for count in counts)])
        self._reader = ShardReader(cache=cache)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> tuple[int, int, list[Slot]]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        first = int(number - self._starts[which]) * self._size
        samples = range(first, min(first + self._size, self._counts[which]))
        tar = self._tars[which]
        return which, first, [load_slot(self._reader, tar, i, self._image_size, self._background) for i in samples]


def load_slot(reader: ShardReader, tar: Shard, index: int, image_size: int, background: Color | None = None) -> Slot:
    """Decode the images of one sample; for one that cannot be used, keep the reason.

    Raises:
        DataError: the storage failed.
    """
    key, record, image_count = reader.stored(tar, index)
    members = {} if record is None else {"json": record}
    none = np.zeros((0, 3, image_size, image_size), dtype=np.uint8)

    def skipped(reason: str, message: str) -> Slot:
        note = json.dumps({"reason": reason, "message": message, "images": image_count}).encode()
        return Slot(key, {**members, SKIPPED: note}, none, reason)

    try:
        images = reader.read(tar, index).images
    except SampleError as error:
        if error.reason in _OF_THE_STORAGE:
            raise
        return skipped(error.reason, str(error))
    try:
        pixels = [to_pixels(image, image_size, background=background) for image in images]
    except ImageError as error:
        return skipped(error.reason, f"{tar}: sample {key}: {error}")
    return Slot(key, members, np.stack(pixels) if pixels else none)


def write_features(
    vision: TinyGPTVForConditionalGeneration,
    chunks: ImageChunks,
    outs: list[Path],
    *,
    dtype: str,
    workers: int,
    done: Callable[[list[Slot]], object],
) -> None:
    """Write one tar of features, with its index, for each tar of `chunks`; each appears complete or not at all.

    Args:
        vision: from `build_vision`, on the device that computes.
        chunks: the samples.
        outs: the tars to write, in the order of those that are read.
        dtype: of matrix products and of the stored features.
        workers: processes that decode images in parallel; 0 decodes in this process.
        done: called with the slots of each written chunk.
    """
    device = vision.query_tokens.device
    loader = DataLoader(
        chunks, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, collate_fn=_unchanged
    )
    for which, of_one_tar in groupby(loader, key=lambda chunk: chunk[0]):
        slots = _with_features(vision, (chunk for _, _, chunk in of_one_tar), dtype, device, done)
        _write_tar(outs[which], slots)


def encode(vision: TinyGPTVForConditionalGeneration, pixels: Tensor, dtype: str) -> Tensor:
    """Encode pixels, uint8 `[N, 3, S, S]`, to features `[N, queries, width]`, exactly those of training in `dtype`."""
    with torch.no_grad(), torch.autocast(pixels.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        return vision.encode_vision(pixels).to(DTYPES[dtype])


def _unchanged(chunk: Any) -> Any:
    return chunk  # torch's default would make tensors of it


def _with_features(
    vision: TinyGPTVForConditionalGeneration,
    chunks: Iterable[list[Slot]],
    dtype: str,
    device: torch.device,
    done: Callable[[list[Slot]], object],
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Yield (key, members) of every sample."""
    for slots in chunks:
        pixels = torch.from_numpy(np.concatenate([slot.pixels for slot in slots]))
        features = iter(encode(vision, pixels.to(device), dtype).cpu() if len(pixels) else ())
        for slot in slots:
            stored = [next(features).contiguous().view(torch.uint8).numpy().tobytes() for _ in slot.pixels]
            names = [dtype] if len(stored) == 1 else [f"{number}.{dtype}" for number in range(len(stored))]
            yield slot.key, dict(zip(names, stored, strict=True)) | slot.members
        done(slots)


def _write_tar(tar: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    with whole_file(tar) as partial, partial.open("wb") as file, open_tar(file) as writer:
        for key, members in samples:
            add_sample(writer, key, members)
    build_index(tar)
