"""The writer of safetensors files: tensor by tensor, so that a model of any size needs the memory of one tensor.

Exports, converted weights, a run's `model/` and checkpoints are all written here. The library's own writer needs every
tensor in memory at once and holds Python's lock while it writes, which would stop the training during a checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import DTYPES_BY_CODE, Stored

SHARD_BYTES = 4_000_000_000
_CODES = {dtype: code for code, dtype in DTYPES_BY_CODE.items()}


def write_weights(
    folder: Path,
    tensors: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors` into a folder, or shards with their index, as transformers reads them.

    Args:
        folder: an existing folder.
        tensors: by name.
        dtype: of all floating-point tensors; None keeps each one's own.
        shard_bytes: a new shard begins before this many bytes are exceeded.

    Raises:
        WeightsError: a value does not fit into `dtype`, or what it is read from is damaged.
    """
    shards = _shards(tensors, dtype, shard_bytes)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors, dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    with _progress_bar(shards, dtype, folder.name) as bar:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / file, shard, dtype=dtype, on_write=lambda data: bar.update(len(data)))
            weight_map |= dict.fromkeys(shard, file)
    total = sum(_bytes(stored, dtype) for stored in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Stored], *, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file under a progress bar; arguments and errors as of `write_weights`."""
    with _progress_bar([tensors], dtype, path.name) as bar:
        write_tensors(path, tensors, dtype=dtype, on_write=lambda data: bar.update(len(data)))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    on_write: Callable[[bytes | memoryview], object],
) -> None:
    """Write one safetensors file; the file is not synced and is incomplete until this returns.

    Args:
        path: the file.
        tensors: by name.
        dtype: of all floating-point tensors; None keeps each one's own.
        on_write: called with each piece of the file before it is written, e.g. to hash the file on the way.

    Raises:
        WeightsError: as of `write_weights`.
    """
    ordered = _in_file_order(tensors, dtype)
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(ordered, dtype):
            on_write(piece)
            _write_all(file.write, piece)


def stored_dtype(stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a tensor is written in: `dtype` if it is of floating point and one is asked for, else its own."""
    return dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype


def convert_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`.

    Raises:
        WeightsError: a finite value became infinite.
    """
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
        raise WeightsError(
            f"{name} holds values up to {tensor.abs().max():.3g}, above fp16's 65504; take bf16 or fp32 instead"
        )
    return converted


def _progress_bar(files: list[Mapping[str, Stored]], dtype: torch.dtype | None, desc: str) -> tqdm:
    total = sum(len(_header(tensors, dtype)) + sum(_bytes(s, dtype) for s in tensors.values()) for tensors in files)
    return tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=None, leave=False)


def _bytes(stored: Stored, dtype: torch.dtype | None) -> int:
    return stored.numel * stored_dtype(stored, dtype).itemsize


def _shards(tensors: Mapping[str, Stored], dtype: torch.dtype | None, limit: int) -> list[Mapping[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        size = _bytes(stored, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += size
    return [*shards]


def _in_file_order(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Stored]:
    """Order the widest dtypes first, as the library does: every tensor then begins at a multiple of its item size."""
    return dict(sorted(tensors.items(), key=lambda item: -stored_dtype(item[1], dtype).itemsize))


def _header(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> bytes:
    """Return eight bytes of length, then JSON: dtype, shape and place of every tensor (the safetensors format)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + _bytes(stored, dtype)
        code = _CODES[stored_dtype(stored, dtype)]
        header[name] = {"dtype": code, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> Iterator[bytes | memoryview]:
    yield _header(tensors, dtype)
    for name, stored in tensors.items():
        tensor = stored.read()
        if tuple(tensor.shape) != stored.shape:
            raise WeightsError(
                f"{name} is {list(tensor.shape)}, but was {list(stored.shape)} when the file was opened; the file "
                "changed in the meantime, run the command again"
            )
        tensor = convert_tensor(name, tensor.detach(), stored_dtype(stored, dtype))
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(write: Callable[[memoryview], int], data: bytes | memoryview) -> None:
    """Write all of `data`: one unbuffered write may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[write(left) :]
