"""Weight files, opened without reading them and then read tensor by tensor; no pickle is executed.

Reads safetensors and PyTorch files, single or in shards. A tensor that is read has memory of its own and no file stays
mapped, so converting a model never holds more than the tensors in use.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tinygptv_ds.errors import WeightsError

_SHOWN = 4
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


def open_weights(path: Path) -> dict[str, Stored]:
    """Open all tensors of a file, or of a folder's file or shards, without reading them.

    A PyTorch file may be a flat state dict or hold one under "model". In a folder, safetensors files are preferred to
    .bin files, and an index names its shards.

    Raises:
        WeightsError: nothing is there, a shard is missing, or a file is damaged or holds more than tensors.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        tensors, _ = open_file(file)
        twice = found.keys() & tensors.keys()
        if twice:
            raise WeightsError(f"{path}: {listing(twice)} in more than one file; keep one copy of the weights there")
        found |= tensors
    return found


def open_file(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Open one file as `open_weights` does; return its tensors, and what a PyTorch file holds next to "model"."""
    if is_safetensors(path):
        return _open_safetensors(path), {}
    content: Any = open_torch(path)
    nested = isinstance(content, dict) and "model" in content
    state = content["model"] if nested else content
    found = {name: value for name, value in state.items() if isinstance(value, Stored)} if type(state) is dict else {}
    if not found:
        raise WeightsError(f"{path}: no state dict (tensors by name, or such a dict under 'model')")
    return found, {key: value for key, value in content.items() if key != "model"} if nested else {}


def weight_files(path: Path) -> list[Path]:
    """Return the files that `open_weights` opens, in the order of their names.

    Raises:
        WeightsError: there are none, or an index names one that is missing or in another folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or folder; correct the path, or put the weights there")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return _shards(path / index)
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(path.glob(pattern))
        if files:
            return files
    others = sorted(path.glob("*.pth")) + sorted(path.glob("*.pt"))
    hint = f"; name the file itself: {others[0]}" if others else ""
    raise WeightsError(f"{path}: no weights there (*.safetensors or pytorch_model*.bin){hint}")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors, with eight bytes of length and then JSON; its suffix may be wrong."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def open_torch(path: Path, known: Sequence[tuple[Any, str]] = ()) -> Any:
    """Return what a PyTorch file holds, with a `Stored` for every tensor.

    Args:
        path: the file.
        known: (stand-in, "module.name") of harmless classes that may occur next to tensors and plain containers; the
            stand-in replaces them, so that no foreign code is imported.

    Raises:
        WeightsError: the file is damaged, or holds other Python objects.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if head != b"PK" and not head.startswith(b"\x80"):  # an archive, or a pickle
        raise WeightsError(f"{path}: neither a safetensors nor a PyTorch file, or damaged; fetch or copy it again")
    if head != b"PK":  # before torch 1.6: nothing is known without reading all
        return _map_tensors(load_torch(path, known), in_memory)
    with FakeTensorMode():
        content = load_torch(path, known)
    return _map_tensors(content, partial(_in_file, path))


def load_torch(path: Path, known: Sequence[tuple[Any, str]] = ()) -> Any:
    """Read a whole PyTorch file with the restricted unpickler; `known` as in `open_torch`.

    Raises:
        WeightsError: the file is damaged, or holds Python objects other than tensors and plain containers.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported \w+: |unsupported )(?:GLOBAL )?([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise WeightsError(
            f"{path}: holds more than tensors and plain values{what}, or is damaged; it is not opened because "
            "unpickling could run code. Take a safetensors version, or one saved with torch.save of a plain state dict"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{path}: damaged, cut short or not a PyTorch file ({reason}); fetch or copy it again"
        ) from None


def listing(names: Iterable[str]) -> str:
    """Return the first few names and the number of further ones."""
    names = sorted(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        WeightsError: there is no such file, or it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}; it belongs to the weights next to it") from None
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: a JSON object is expected; fetch the file again")
    return content


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map; fetch the file again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index}: shards must be in the same folder, not at {listing(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{index.parent}: {listing(missing)} missing; fetch all the shards that {index.name} names")
    return [index.parent / name for name in names]


def _open_safetensors(path: Path) -> dict[str, Stored]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                dtype = DTYPES_BY_CODE[view.get_dtype()]
                found[name] = Stored(tuple(view.get_shape()), dtype, partial(_read_safetensors, path, name))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); fetch or copy the file again") from None
    except KeyError as error:
        raise WeightsError(f"{path}: {name} is of dtype {error}, which is not read here; convert it first") from None
    return found


def _read_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _map_tensors(content: Any, stored: Callable[[Tensor], Stored]) -> Any:
    """Return the same content with every tensor replaced."""
    if isinstance(content, Tensor):
        return stored(content)
    if isinstance(content, dict):
        return {key: _map_tensors(value, stored) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_map_tensors(value, stored) for value in content)
    return content


def _in_file(path: Path, fake: Tensor) -> Stored:
    """Find the place of a tensor in a PyTorch file, which `torch.load` notes under `FakeTensorMode`."""
    item = fake.element_size()
    # A private attribute. Remove when torch.load has a public way to read single tensors of a file.
    storage_begin: Any = fake.untyped_storage()._checkpoint_offset
    offset = storage_begin + int(fake.storage_offset()) * item
    shape, stride = tuple(fake.shape), fake.stride()
    count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if fake.numel() else 0
    values = partial(_read_values, path, offset, fake.dtype)
    flat = values if fake.is_contiguous() else None
    return Stored(shape, fake.dtype, lambda: values(0, count).as_strided(shape, stride), flat)


def _read_values(path: Path, offset: int, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    size = (end - begin) * dtype.itemsize
    buffer = torch.empty(size, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(offset + begin * dtype.itemsize)
        if file.readinto(buffer.numpy().data) != size:
            raise WeightsError(f"{path}: cut short; fetch or copy it again")
    return buffer.view(dtype)
