"""safetensors files written tensor by tensor, so that a model of any size goes through in the memory of one tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
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
        folder: where; it exists.
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
    weight_map = {}
    with _bar(tensors, dtype, folder.name) as bar:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write(folder / file, {name: tensors[name] for name in names}, dtype, bar)
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": bar.total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Stored], *, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file; arguments and errors as of `write_weights`."""
    with _bar(tensors, dtype, path.name) as bar:
        _write(path, tensors, dtype, bar)


def stored_dtype(stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in: `dtype` where it is of floating point and one is asked for, else its own."""
    return dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype


def convert_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`.

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


def _bar(tensors: Mapping[str, Stored], dtype: torch.dtype | None, desc: str) -> tqdm:
    total = sum(_bytes(stored, dtype) for stored in tensors.values())
    return tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=None, leave=False)


def _bytes(stored: Stored, dtype: torch.dtype | None) -> int:
    return stored.numel * stored_dtype(stored, dtype).itemsize


def _shards(tensors: Mapping[str, Stored], dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in tensors.items():
        size = _bytes(stored, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write(path: Path, tensors: Mapping[str, Stored], dtype: torch.dtype | None, bar: tqdm) -> None:
    # Widest first, as the format's own library does: every tensor then lies at a multiple of its item size.
    order = sorted(tensors, key=lambda name: -stored_dtype(tensors[name], dtype).itemsize)
    with path.open("wb") as file:
        file.write(_header({name: tensors[name] for name in order}, dtype))
        for data in _data(order, tensors, dtype):
            file.write(data.numpy())
            bar.update(len(data))


def _header(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> bytes:
    """Eight bytes of length, then JSON: dtype, shape and place of every tensor (the safetensors format)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + _bytes(stored, dtype)
        code = _CODES[stored_dtype(stored, dtype)]
        header[name] = {"dtype": code, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(order: list[str], tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> Iterator[Tensor]:
    for name in order:
        stored = tensors[name]
        tensor = stored.read()
        if tuple(tensor.shape) != stored.shape:
            raise WeightsError(f"{name} is {list(tensor.shape)}, announced as {list(stored.shape)}; the file changed")
        tensor = convert_tensor(name, tensor.detach(), stored_dtype(stored, dtype))
        yield tensor.contiguous().reshape(-1).view(torch.uint8)
