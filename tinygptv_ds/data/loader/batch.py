"""The training batch: samples end to end, no padding. The only thing that data and model share."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.processing.sequence import IGNORE, Sequence


@dataclass(frozen=True)
class Sample:
    """One sample in tokens and pixels or features.

    Attributes:
        ref: which sample it is.
        sequence: its row.
        pixels: uint8 `[n, 3, S, S]`; none where there are features.
        features: `[n, queries, width]`, or None.
    """

    ref: SampleRef
    sequence: Sequence
    pixels: np.ndarray
    features: Tensor | None = None

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.pixels if self.features is None else self.features)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: int64 `[T]`; image positions hold the image token id.
        position_ids: int64 `[T]`, restart at 0 in every sample; may skip.
        cu_seqlens: int32 `[samples + 1]`.
        max_seqlen: longest sample.
        pixel_values: uint8 `[N, 3, S, S]`; N may be 0, and is where there are features.
        image_rows: int64 `[R]`: rows of `input_ids` that hold image rows.
        image_index: int64 `[R]`: which of the N * queries image rows goes there.
        target_rows: int64 `[K]`: rows whose output predicts a target, the one before each labelled token.
        targets: int64 `[K]`: the labelled tokens.
        target_dataset: int64 `[K]`: number of the dataset each target comes from.
        sample_ids: which samples these are, to be named whenever something goes wrong.
        image_features: `[N, queries, width]`, in the dtype of their file; None in training from pixels.
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
    sample_ids: tuple[SampleRef, ...]
    image_features: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Copy to a device, without waiting where the memory is pinned."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Pinned copies; called by torch's DataLoader."""
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> Batch:
        """This batch, its memory kept until `stream` has done what is queued in it now."""
        return self._map(lambda t: _recorded(t, stream))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def collate(
    samples: Seq[Sample],
    datasets: Seq[str],
    *,
    queries: int,
    image_size: int,
    bos: int,
    no_features: Tensor | None = None,
) -> Batch:
    """Pack samples end to end.

    Where all samples of a micro-batch dropped out, a single BOS token without a target stands in, so that every rank
    still makes the same calls.

    Args:
        samples: in stream order.
        datasets: names of the mixture's datasets, in the order in which losses are reported.
        queries: rows of an image.
        image_size: side of the images, for a batch without any.
        bos: id of the BOS token.
        no_features: `[0, queries, width]`, for a batch without any; None where samples come in pixels.
    """
    rows = [sample.sequence for sample in samples] or [_lone_token(bos)]
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])
    images = np.cumsum([0, *(sample.images for sample in samples)])
    labels = np.concatenate([row.labels for row in rows])
    learnt = np.flatnonzero(labels != IGNORE)
    dataset = np.array([datasets.index(sample.ref.dataset) for sample in samples] or [0], dtype=np.int64)
    pixels = [sample.pixels for sample in samples if len(sample.pixels)]
    empty = np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    parts = {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "position_ids": np.concatenate([row.position_ids for row in rows]),
        "cu_seqlens": starts.astype(np.int32),
        "pixel_values": np.concatenate(pixels) if pixels else empty,
        "image_rows": np.concatenate([row.image_rows + start for row, start in zip(rows, starts, strict=False)]),
        "image_index": np.concatenate(
            [row.image_index + first * queries for row, first in zip(rows, images, strict=False)]
        ),
        "target_rows": learnt - 1,  # the first token of a sample is never learnt, so the row before is its own
        "targets": labels[learnt],
        "target_dataset": dataset.repeat(lengths)[learnt],
    }
    tensors = {name: torch.from_numpy(array) for name, array in parts.items()}
    if no_features is not None:
        tensors["image_features"] = torch.cat([no_features, *(sample.features for sample in samples)])
    return Batch(**tensors, max_seqlen=max(lengths), sample_ids=tuple(sample.ref for sample in samples))


def _recorded(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


def _lone_token(bos: int) -> Sequence:
    none = np.zeros(0, dtype=np.int64)
    return Sequence(np.array([bos]), np.array([IGNORE]), np.array([0]), none, none)
