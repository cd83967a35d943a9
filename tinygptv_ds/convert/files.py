"""What a file supplies to the model: tensors under canonical names, checked by name and shape before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.convert.storage import Stored, listing
from tinygptv_ds.errors import WeightsError


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
