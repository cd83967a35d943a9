"""Weight files, read tensor by tensor: safetensors and PyTorch files, one or in shards; no pickle is executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinygptv_ds.errors import WeightsError

_SHOWN = 4


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file.

    Attributes:
        shape: its shape, known without reading it.
        read: reads it; each call reads anew.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """What one file or folder supplies to the model.

    Attributes:
        path: the file or folder.
        weights: tensors by canonical name.
        ignored: names of the file that the model has no use for, known one by one.
    """

    path: Path
    weights: dict[str, Stored]
    ignored: list[str]


def open_weights(path: Path) -> dict[str, Stored]:
    """All tensors of a file, or of a folder's file or shards, without reading them.

    A PyTorch file may be a flat state dict or hold one under "model". In a folder safetensors are preferred to .bin,
    and an index names its shards.

    Raises:
        WeightsError: nothing is there, a shard is missing, or a file is damaged or holds more than tensors.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(path):
        tensors = _open_file(file)
        twice = found.keys() & tensors.keys()
        if twice:
            raise WeightsError(f"{path}: {listing(twice)} in more than one file; keep one copy of the weights there")
        found |= tensors
    return found


def rename_all(stored: Mapping[str, Stored], rename: Callable[[str], str | None], path: Path) -> Source:
    """Give every tensor its canonical name; those renamed to None are ignored.

    Raises:
        WeightsError: two tensors get the same name.
    """
    weights: dict[str, Stored] = {}
    ignored = []
    for name, tensor in stored.items():
        canonical = rename(name)
        if canonical is None:
            ignored.append(name)
        elif canonical in weights:
            raise WeightsError(f"{path}: two tensors stand for {canonical}; the file mixes two layouts")
        else:
            weights[canonical] = tensor
    return Source(path, weights, ignored)


def check_weights(expected: Mapping[str, tuple[int, ...]], source: Source, advice: str) -> None:
    """See that a source supplies exactly these names in these shapes.

    Args:
        expected: shapes by canonical name.
        source: what is there.
        advice: the likely cause and what to do, for the message.

    Raises:
        WeightsError: anything is missing, unexpected or of another shape.
    """
    given = source.weights
    wrong_shape = [
        f"{name} is {list(given[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != tuple(shape)
    ]
    problems = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "wrong shape": wrong_shape,
    }
    told = [f"{what}: {listing(names)}" for what, names in problems.items() if names]
    if told:
        raise WeightsError(f"{source.path}: {'; '.join(told)}. {advice}")


def copy_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Stored]) -> None:
    """Read each tensor and copy it into its target, one at a time, in the target's dtype."""
    with torch.no_grad():
        for name, stored in weights.items():
            targets[name].copy_(stored.read())


def listing(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    names = sorted(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        WeightsError: there is no such file, or it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}; it belongs to the weights beside it") from None
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: a JSON object is expected; fetch the file again")
    return content


def _weight_files(path: Path) -> list[Path]:
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
    raise WeightsError(f"{path}: no weights there (*.safetensors or pytorch_model*.bin)")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map; fetch the file again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index}: shards must lie beside it, not at {listing(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{index.parent}: {listing(missing)} missing; fetch all the shards that {index.name} names")
    return [index.parent / name for name in names]


def _open_file(path: Path) -> dict[str, Stored]:
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors: eight bytes of header length, then JSON. The name's ending is not to be relied upon.
    return _open_safetensors(path) if head[8:] == b"{" else _open_torch(path, is_zip=head.startswith(b"PK"))


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); fetch or copy the file again") from None
    return {
        name: Stored(tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name))
        for name in handle.keys()  # noqa: SIM118 - not a mapping
    }


def _open_torch(path: Path, *, is_zip: bool) -> dict[str, Stored]:
    content = load_torch(path, is_zip=is_zip)
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: no state dict (tensors by name, or such a dict under 'model')")
    return {
        name: Stored(tuple(value.shape), partial(_same, value))
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def load_torch(path: Path, *, is_zip: bool = True) -> object:
    """A PyTorch file through the restricted unpickler, mapped into memory where its format allows.

    Raises:
        WeightsError: the file is damaged, or holds Python objects other than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{path}: holds more than tensors and plain values, or is damaged; it is not opened because unpickling "
            f"could run code ({reason}). Take a safetensors version, or one saved with torch.save of a plain state dict"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{path}: damaged, cut short or no PyTorch file ({reason}); fetch or copy it again"
        ) from None


def _same(tensor: Tensor) -> Tensor:
    return tensor
