"""Folders of weights: their files, single or in shards with an index, opened without reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygptv_ds.config.paths import local_path
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, is_safetensors, listing, open_safetensors, read_json
from tinygptv_ds.weights.other_files import not_there, nothing_in, other_file, unfinished
from tinygptv_ds.weights.state_dict import find_state
from tinygptv_ds.weights.torch_file import open_torch

_MOST_SHARDS = 10_000
_LONGEST_NAME = 255  # of a file


def open_weights(path: Path) -> dict[str, Stored]:
    """Open all tensors of a file, or of a folder's file or shards, under the names there, without reading them.

    In a folder, safetensors files are preferred to .bin files, and an index names its shards.

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
    """Open one file as `open_weights` does; return its tensors, and what a PyTorch file holds next to them."""
    other = other_file(path)
    if other is not None:
        raise WeightsError(f"{path}: {other}")
    if is_safetensors(path):
        return open_safetensors(path), {}
    return find_state(open_torch(path), path)


def weight_files(path: Path) -> list[Path]:
    """Return the files that `open_weights` opens, in the order of their names.

    Raises:
        WeightsError: there are none, or an index names one that is missing or in another folder.
    """
    path = local_path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(f"{path}: {not_there(path)}")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return _shards(path / index)
    for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin"):
        files = sorted(path.glob(pattern))
        broken = [file.name for file in files if not file.exists()]
        if broken:
            raise WeightsError(f"{path}: {nothing_in(path)}")
        if files:
            return files
    raise WeightsError(f"{path}: no weights there (*.safetensors or pytorch_model*.bin); {nothing_in(path)}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map, which lists the shard of each tensor; name the weight file itself")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > _MOST_SHARDS:
        raise WeightsError(f"{index}: names {len(names):,} shards, more than any model has; download it again")
    outside = [name for name in names if Path(name).name != name or "\0" in name or len(name) > _LONGEST_NAME]
    if outside:
        raise WeightsError(f"{index}: shards must be in the same folder, not at {listing(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        hint = unfinished(index.parent) or "`hf download` of the repository fetches what is missing"
        raise WeightsError(
            f"{index.parent}: {len(missing)} of the {len(names)} shards that {index.name} names are missing "
            f"({listing(missing)}); {hint}"
        )
    return [index.parent / name for name in names]
