"""Micro-batches padded to a few sizes, in buffers that stay where they are: what a CUDA graph can be replayed on.

Tokens are padded by a sample of their own at the end, without targets. Attention does not cross samples, so that the
padding changes no loss, and its gradients are zero: results equal those of the batch as it is, up to the order in which
sums are taken. Dropout is keyed by token and stays the same, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinygptv_ds.processing.sequence import IGNORE


@dataclass(frozen=True)
class Bucket:
    """The sizes that micro-batches are padded to.

    Attributes:
        tokens: of the packed row, with at least one of padding.
        samples: with at least one for the padding; those that are left are empty.
        targets: rows that the language-model head runs on.
        images: as many as there are, since an image is the most expensive part.
        features: images come as features.
    """

    tokens: int
    samples: int
    targets: int
    images: int
    features: bool


def bucket_of(inputs: Mapping[str, Any]) -> Bucket:
    """Return the bucket of a micro-batch, by shapes alone.

    Tokens come in four sizes between two powers of two, which pads 10 % on average; samples and targets, which cost
    little, in powers of two.

    Args:
        inputs: keyword arguments of the model's packed forward.
    """
    tokens = _rounded(len(inputs["input_ids"]) + 1)
    features = inputs["image_features"] is not None
    return Bucket(
        tokens,
        samples=_power_of_two(len(inputs["cu_seqlens"])),  # one entry more than samples
        targets=min(max(32, _power_of_two(len(inputs["targets"]))), tokens),
        images=len(inputs["image_features"] if features else inputs["pixel_values"]),
        features=features,
    )


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _rounded(count: int) -> int:
    step = max(32, _power_of_two(count) // 8)
    return -(-count // step) * step


class StaticInputs:
    """The buffers of a bucket, as keyword arguments of the model's packed forward.

    Args:
        bucket: their sizes.
        inputs: a micro-batch of this bucket, on the device.
        queries: rows of an image.
    """

    def __init__(self, bucket: Bucket, inputs: Mapping[str, Any], queries: int) -> None:
        last, rows = bucket.tokens - 1, bucket.images * queries
        # Length and value of the padding. Rows of padding are read and written by padding alone: the last one is.
        self._padding = {
            "input_ids": (bucket.tokens, 0),
            "position_ids": (bucket.tokens, 0),
            "dropout_keys": (bucket.tokens, 0),
            "cu_seqlens": (bucket.samples + 1, bucket.tokens),
            "image_rows": (rows, last),
            "image_index": (rows, 0),
            "target_rows": (bucket.targets, last),
            "targets": (bucket.targets, IGNORE),
        }
        buffers = {
            name: given.new_empty((self._padding.get(name, given.shape)[0], *given.shape[1:]))
            for name, given in inputs.items()
            if isinstance(given, Tensor)
        }
        self.inputs: dict[str, Any] = {"image_features": None, **buffers, "max_seqlen": bucket.tokens}

    def fill(self, inputs: Mapping[str, Any]) -> None:
        """Copy a micro-batch of the bucket into the buffers, on the device, and fill up the rest."""
        for name, given in inputs.items():
            if isinstance(given, Tensor):
                buffer = self.inputs[name]
                if name in self._padding:
                    buffer[len(given) :] = self._padding[name][1]
                buffer[: len(given)].copy_(given)


def padded(inputs: Mapping[str, Any], queries: int) -> dict[str, Any]:
    """Return a micro-batch padded to its bucket, in buffers of its own."""
    static = StaticInputs(bucket_of(inputs), inputs, queries)
    static.fill(inputs)
    return static.inputs
