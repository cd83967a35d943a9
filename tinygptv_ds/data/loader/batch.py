"""The training batch: samples packed end to end without padding. It is all that data loading and model share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinygptv_ds.data.loader.sample import Sample, SkippedSample
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.order import stable_hash
from tinygptv_ds.processing.sequence import IGNORE, TokenRow


@dataclass(frozen=True)
class Batch:
    """The packed samples of one micro-batch of one rank.

    T is the number of tokens, N of images, R of token rows that hold an image row, K of target tokens.

    Attributes:
        input_ids: int64 `[T]`; image positions hold the image token id.
        position_ids: int64 `[T]`; restart at 0 in every sample and may skip numbers.
        cu_seqlens: int32 `[samples + 1]`, where each sample starts.
        max_seqlen: tokens of the longest sample.
        pixel_values: uint8 `[N, 3, S, S]`; N may be 0, and is where `image_features` are given.
        image_rows: int64 `[R]`, the rows of `input_ids` that hold image rows.
        image_index: int64 `[R]`, which of the N * queries image rows goes there.
        target_rows: int64 `[K]`, the rows whose output predicts a target: the one before each target token.
        targets: int64 `[K]`, the target tokens.
        target_dataset: int64 `[K]`, number of the dataset of each target.
        dropout_keys: int64 `[T]`, of seed, sample and position: equal keys have equal masks of dropout.
        sample_ids: which samples these are, to name them when something goes wrong.
        image_features: `[N, queries, width]` in the dtype of their file; None when training from pixels.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pixel_values: Tensor
    image_rows: Tensor
    image_index: Tensor
    target_rows: Tensor
    targets: Tensor
    target_dataset: Tensor
    dropout_keys: Tensor
    sample_ids: tuple[SampleRef, ...]
    image_features: Tensor | None = None

    @property
    def images(self) -> int:
        """Number of images, in pixels or as features."""
        return len(self.pixel_values if self.image_features is None else self.image_features)

    def to(self, device: torch.device) -> Batch:
        """Copy all tensors to a device, without waiting where the memory is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def has_image(self) -> np.ndarray:
        """Return for each of `sample_ids` whether it has an image: bool `[samples]`. For a batch on the CPU."""
        starts = np.searchsorted(self.image_rows.numpy(), self.cu_seqlens.numpy())
        return (np.diff(starts) > 0)[: len(self.sample_ids)]

    def pin_memory(self) -> Batch:
        """Copy all tensors into pinned memory; called by torch's DataLoader."""
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> Batch:
        """Keep the memory of all tensors until `stream` has done what is queued in it now; return this batch."""
        return self._map(lambda t: _recorded(t, stream))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class MicroBatch:
    """The batch of one micro-batch, and the samples that were left out of it."""

    batch: Batch
    skipped: tuple[SkippedSample, ...]

    def pin_memory(self) -> MicroBatch:
        """Copy the batch into pinned memory; called by torch's DataLoader."""
        return MicroBatch(self.batch.pin_memory(), self.skipped)


def collate(
    samples: Sequence[Sample],
    datasets: Sequence[str],
    *,
    queries: int,
    image_size: int,
    bos: int,
    seed: int = 0,
    no_features: Tensor | None = None,
) -> Batch:
    """Pack samples end to end.

    If no sample of a micro-batch could be used, a single BOS token without a target takes their place, so that every
    rank still makes the same calls.

    Args:
        samples: in stream order.
        datasets: names of the mixture's datasets, in the order in which losses are reported.
        queries: rows of an image.
        image_size: side of the images in pixels, for a batch without any.
        bos: id of the BOS token.
        seed: of the recipe, for dropout.
        no_features: `[0, queries, width]`, for a batch without any image; None when training from pixels.
    """
    rows = [sample.sequence for sample in samples] or [_lone_token(bos)]
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])
    images = np.cumsum([0, *(sample.images for sample in samples)])
    labels = np.concatenate([row.labels for row in rows])
    target_at = np.flatnonzero(labels != IGNORE)
    dataset = np.array([datasets.index(sample.ref.dataset) for sample in samples] or [0], dtype=np.int64)
    pixels = [sample.pixels for sample in samples if len(sample.pixels)]
    empty = np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "position_ids": np.concatenate([row.position_ids for row in rows]),
        "cu_seqlens": starts.astype(np.int32),
        "pixel_values": np.concatenate(pixels) if pixels else empty,
        "image_rows": np.concatenate([row.image_rows + start for row, start in zip(rows, starts, strict=False)]),
        "image_index": np.concatenate(
            [row.image_index + first * queries for row, first in zip(rows, images, strict=False)]
        ),
        "target_rows": target_at - 1,  # the first token of a sample is never a target, so the row before is its own
        "targets": labels[target_at],
        "target_dataset": dataset.repeat(lengths)[target_at],
        "dropout_keys": _dropout_keys(samples, rows, seed),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if no_features is not None:
        tensors["image_features"] = torch.cat(
            [no_features, *(sample.features for sample in samples if sample.features is not None)]
        )
    return Batch(**tensors, max_seqlen=max(lengths), sample_ids=tuple(sample.ref for sample in samples))


def _dropout_keys(samples: Sequence[Sample], rows: Sequence[TokenRow], seed: int) -> np.ndarray:
    """Return int64 `[T]`: a hash of the seed, the sample's place in the stream (and so of the step) and the position.

    Positions are those that the model uses, which are the same packed and padded.
    """
    places = [sample.ref.position for sample in samples] or [-1]
    firsts = np.array([stable_hash(seed, "dropout", place) % 2**64 for place in places], dtype=np.uint64)
    counters = np.concatenate([row.position_ids for row in rows]).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    # splitmix64 (Steele et al. 2014), whose counters these are; NumPy's unsigned integers wrap around.
    keys = firsts.repeat([len(row) for row in rows]) + counters
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (keys ^ (keys >> np.uint64(31))).view(np.int64)


def _recorded(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


def _lone_token(bos: int) -> TokenRow:
    none = np.zeros(0, dtype=np.int64)
    return TokenRow(np.array([bos]), np.array([IGNORE]), np.array([0]), none, none)
