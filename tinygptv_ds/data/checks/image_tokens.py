"""How many tokens an image takes, from the weights that a recipe names: only headers are read."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PUBLISHED = 32  # of BLIP-2's Q-Former
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


def image_tokens(qformer: str) -> int | None:
    """Return the number of query tokens in a Q-Former's weights, or in an exported folder named in their place.

    None where the file is not there or holds none that can be read: training would say why.
    """
    path = Path(qformer)
    with contextlib.suppress(
        OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, AttributeError, struct.error
    ):
        if path.is_dir():
            return int(json.loads((path / "config.json").read_bytes())["num_query_tokens"])
        if path.suffix == ".safetensors":
            return _queries_in({name: entry["shape"] for name, entry in _header(path).items() if "shape" in entry})
        return _queries_in(_torch_shapes(path))
    return None


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(min(length, _LONGEST_HEADER)))


def _torch_shapes(path: Path) -> dict[str, list[int]]:
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError("no plain weights") from error
    while isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    return {name: list(value.shape) for name, value in content.items() if isinstance(value, torch.Tensor)}


def _queries_in(shapes: Mapping[str, list[int]]) -> int | None:
    """Return the number of query tokens: the tensor is `[1, queries, width]`."""
    return next((shape[1] for name, shape in shapes.items() if name.split(".")[-1] == "query_tokens"), None)
