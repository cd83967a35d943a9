"""Weights opened as what a model can take: unwrapped, dequantized, and checked for NaN and Inf when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.io import Stored, listing
from tinygptv_ds.weights.kinds import Unwrapped, unwrap
from tinygptv_ds.weights.quantized import dequantized

_MOST_BYTES = 64 << 30  # of one model's tensors: four times the published model in fp32


class NotFiniteError(WeightsError):
    """Weights of which values are NaN or Inf."""


def open_model_weights(path: Path, kind: str | None = None) -> Unwrapped:
    """Open the weights of one model or part of a model in a file or folder.

    Args:
        path: a file, or a folder with one file or shards.
        kind: as of `unwrap`.

    Raises:
        WeightsError: as of `open_weights`, `dequantized` and `unwrap`, or the tensors take more than any model of this
            kind.
    """
    return model_weights(open_weights(path), path, kind)


def model_weights(stored: Mapping[str, Stored], path: Path, kind: str | None = None) -> Unwrapped:
    """Do for opened tensors what `open_model_weights` does for a file."""
    checked = {name: _checked(tensor, name, path) for name, tensor in stored.items()}
    found = unwrap(dequantized(checked, path), path, kind)
    total = sum(tensor.numel * tensor.dtype.itemsize for tensor in found.stored.values())
    if total > _MOST_BYTES:
        raise WeightsError(
            f"{path}: its tensors take {total:,} bytes, more than this model in any dtype (at most {_MOST_BYTES:,} are "
            "read); name another file"
        )
    return found


def finite(stored: Stored) -> bool:
    """Read a tensor that was opened here and return whether all of its values are finite."""
    try:
        stored.read()
    except NotFiniteError:
        return False
    return True


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        return 0
    # One pass without a copy; the sum of finite values may still overflow, so it decides nothing but that all is well.
    if bool(tensor.sum(dtype=torch.float32).isfinite()):
        return 0
    return int((~tensor.isfinite()).sum())


def _checked(stored: Stored, name: str, path: Path) -> Stored:
    """Return the same tensor, whose reading raises NotFiniteError where a value is NaN or Inf."""
    flat = None if stored.read_flat is None else partial(_read_flat, stored, name, path)
    return Stored(stored.shape, stored.dtype, partial(_read, stored, name, path), flat)


def _read(stored: Stored, name: str, path: Path) -> Tensor:
    return _finite(stored.read(), name, path)


def _read_flat(stored: Stored, name: str, path: Path, begin: int, end: int) -> Tensor:
    return _finite(stored.flat(begin, end), name, path)


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    count = _count_not_finite(tensor)
    if count:
        raise NotFiniteError(
            f"{path}: {listing([name])} holds {count:,} values of {tensor.numel():,} that are NaN or Inf, so nothing "
            "can be computed with it; it was saved after a training that diverged, or a conversion overflowed. Take "
            "another copy or an earlier checkpoint"
        )
    return tensor
