"""Runs the vision path over the images of shards and writes its outputs as shards of features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tinygptv_ds.data.shards.index import build_index
from tinygptv_ds.data.shards.writer import add_sample, open_tar
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.features.image_chunks import ImageChunks, Slot
from tinygptv_ds.files import whole_file
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration


def write_features(
    vision: TinyGPTVForConditionalGeneration,
    chunks: ImageChunks,
    outs: list[Path],
    *,
    dtype: str,
    workers: int,
    done: Callable[[list[Slot]], object],
) -> None:
    """Write one tar of features, with its index, for each tar of `chunks`; each whole or not at all.

    Args:
        vision: from `build_vision`, on the device that computes.
        chunks: the samples.
        outs: the tars to write, in the order of those that are read.
        dtype: what matrix products run in and features are stored in.
        workers: processes that decode images meanwhile; 0 decodes here.
        done: called with the slots of each chunk that is written.
    """
    device = vision.query_tokens.device
    loader = DataLoader(
        chunks, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, collate_fn=_as_it_is
    )
    for which, of_one_tar in groupby(loader, key=lambda chunk: chunk[0]):
        slots = _with_features(vision, (chunk for _, _, chunk in of_one_tar), dtype, device, done)
        _write_tar(outs[which], slots)


def encode(vision: TinyGPTVForConditionalGeneration, pixels: Tensor, dtype: str) -> Tensor:
    """uint8 `[N, 3, S, S]` to `[N, queries, width]`, exactly what `project` of a training in `dtype` would take."""
    with torch.no_grad(), torch.autocast(pixels.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        return vision.encode_vision(pixels).to(DTYPES[dtype])


def _as_it_is(chunk: tuple[int, int, list[Slot]]) -> tuple[int, int, list[Slot]]:
    return chunk  # torch's own would make tensors of it


def _with_features(
    vision: TinyGPTVForConditionalGeneration,
    chunks: Iterable[list[Slot]],
    dtype: str,
    device: torch.device,
    done: Callable[[list[Slot]], object],
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """(key, members) of every sample."""
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
