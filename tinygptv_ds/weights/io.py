"""Tensors in files, known by shape and dtype before they are read one at a time; safetensors files; JSON next to them.

A tensor that is read has memory of its own and no file stays mapped, so converting a model never holds more than the
tensors in use. PyTorch's own files are opened in `torch_file`, folders in `folders`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.other_files import other_file

_SHOWN = 4
_MAX_HEADER = 16_000_000  # bytes; enough for 100,000 tensors
_MAX_JSON = 64_000_000  # bytes
_MAX_TENSOR = 4 << 30  # bytes, eight times the embedding of Phi-2 in fp32
DTYPES_BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or one computed from tensors in files.

    Attributes:
        shape: its shape, known without reading it.
        dtype: its dtype, known without reading it.
        read: reads it; each call reads again.
        read_flat: reads the values from one flat index up to another, if that is cheaper than reading all.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_flat: Callable[[int, int], Tensor] | None = None

    @property
    def numel(self) -> int:
        """The number of its values."""
        return torch.Size(self.shape).numel()

    def flat(self, begin: int, end: int) -> Tensor:
        """Read the values from flat index `begin` up to `end`, `[end - begin]`."""
        return self.read().flatten()[begin:end] if self.read_flat is None else self.read_flat(begin, end)


def in_memory(tensor: Tensor) -> Stored:
    """Wrap a tensor that is already in memory."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like safetensors: eight bytes of length, then JSON. Its suffix may be wrong."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def listing(names: Iterable[str]) -> str:
    """Return the first few names and the number of further ones; a name's control characters are escaped."""
    names = sorted(names)
    more = len(names) - _SHOWN
    shown = [name[:200] if name.isprintable() else repr(name)[1:-1][:200] for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        WeightsError: there is no such file, or it is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise WeightsError(f"{path}: more than {_MAX_JSON:,} bytes of JSON, so it is not what its name says")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}; it belongs to the weights next to it") from None
    except (ValueError, RecursionError) as error:
        what = other_file(path) or f"not JSON ({error}); download it again, or correct it"
        raise WeightsError(f"{path}: {what}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: a JSON object is expected, not a {type(content).__name__}; name another file")
    return content


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Open all tensors of a safetensors file without reading them.

    Raises:
        WeightsError: the file is damaged or cut short, or holds a dtype that is not read here, or a
            tensor that is larger than any of this model.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_HEADER, size - 8):
            reason = f"its header would take {length:,} bytes of {size:,}; at most {_MAX_HEADER:,} are read"
            raise WeightsError(f"{path}: damaged or cut short ({reason}); download or copy it again")
        text = file.read(length)
    try:
        with safe_open(path, framework="pt"):  # the library checks header and offsets against the file's size
            header = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: damaged or cut short ({size:,} bytes; {str(error)[:200]}); download or copy it again, and "
            "compare its size with the source's"
        ) from None
    except (RuntimeError, MemoryError):  # the library maps the whole file
        raise WeightsError(f"{path}: its {size:,} bytes cannot be mapped; check that this is the right file") from None
    return {name: _place(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> Stored:
    """Return the tensor that an entry of a header describes; the tensors' bytes begin at `data`."""
    dtype = DTYPES_BY_CODE.get(entry["dtype"])
    if dtype is None:
        raise WeightsError(
            f"{path}: {listing([name])} is of dtype {entry['dtype']}, which is not read here; convert it to bf16, "
            "fp16 or fp32 first"
        )
    shape = tuple(entry["shape"])
    size = torch.Size(shape).numel() * dtype.itemsize
    if size > _MAX_TENSOR:
        raise WeightsError(
            f"{path}: {listing([name])} of shape {list(shape)} takes {size:,} bytes, more than any weight of this "
            f"model (at most {_MAX_TENSOR:,} are read); name another file"
        )
    flat = partial(read_values, path, data + entry["data_offsets"][0], dtype)
    count = torch.Size(shape).numel()
    return Stored(shape, dtype, lambda: flat(0, count).view(shape), flat)


def read_values(path: Path, offset: int, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Read the values from index `begin` up to `end` of those at a byte offset of a file, `[end - begin]`.

    Raises:
        WeightsError: the file ends before, or there is not enough memory.
    """
    size = (end - begin) * dtype.itemsize
    try:
        buffer = torch.empty(size, dtype=torch.uint8)
    except (MemoryError, RuntimeError):
        raise WeightsError(
            f"{path}: there is no memory for {size:,} bytes of one tensor; check that this is the right file, or free "
            "memory"
        ) from None
    with path.open("rb") as file:
        file.seek(offset + begin * dtype.itemsize)
        if file.readinto(buffer.numpy().data) != size:
            raise WeightsError(f"{path}: cut short; download or copy it again")
    return buffer.view(dtype)
