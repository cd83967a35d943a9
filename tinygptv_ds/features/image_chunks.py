"""Samples of shards in pixels and without a draw, in order and a chunk at a time, from dataloader workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.reader import SampleError, ShardReader
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.data.shards.tar import SKIPPED
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import to_pixels

_OF_THE_STORAGE = ("unreadable", "unreadable_shard", "truncated")  # another time the sample may be whole


@dataclass(frozen=True)
class Slot:
    """One sample's place in its shard.

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
    """Number n to (which of the tars, first sample, slots): the samples of all tars in order, no chunk over two tars.

    Args:
        tars: the shards.
        counts: samples of each.
        size: samples of a chunk.
        image_size: side of the square images.
        cache: where remote shards are fetched to.
    """

    def __init__(
        self, tars: Sequence[Shard], counts: Sequence[int], size: int, image_size: int, cache: ShardCache
    ) -> None:
        self._tars, self._counts, self._size, self._image_size = tars, counts, size, image_size
        self._starts = np.cumsum([0, *(-(-count // size) for count in counts)])
        self._reader = ShardReader(cache=cache)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> tuple[int, int, list[Slot]]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        first = int(number - self._starts[which]) * self._size
        samples = range(first, min(first + self._size, self._counts[which]))
        return which, first, [load_slot(self._reader, self._tars[which], i, self._image_size) for i in samples]


def load_slot(reader: ShardReader, tar: Shard, index: int, image_size: int) -> Slot:
    """Decode the images of one sample; of one that cannot be used the reason is kept.

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
        pixels = [to_pixels(image, image_size) for image in images]
    except DataError as error:
        return skipped("corrupt_image", f"{tar}: sample {key}: {error}")
    return Slot(key, members, np.stack(pixels) if pixels else none)
