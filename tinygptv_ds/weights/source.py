"""What a file supplies to the model: tensors under canonical names, checked by name and shape before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing
from tinygptv_ds.weights.safetensors_writer import convert_tensor


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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by canonical name."""
        return {name: stored.shape for name, stored in self.weights.items()}


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


@dataclass(frozen=True)
class Match:
    """How the names and shapes of a source agree with those that are expected.

    Attributes:
        matched: names that agree in shape.
        missing: names that are not there.
        unexpected: names that are there besides.
        wrong_shape: name, shape there and shape expected, in words.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]

    def __str__(self) -> str:
        told = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": self.wrong_shape}
        return "; ".join(f"{what}: {listing(names)}" for what, names in told.items() if names)


def compare(expected: Mapping[str, tuple[int, ...]], source: Source) -> Match:
    """Hold a source's names and shapes against expected ones; the `Match` reads "" where all agree."""
    given = source.shapes
    differing = [name for name, shape in expected.items() if given.get(name, shape) != tuple(shape)]
    return Match(
        matched=[name for name, shape in expected.items() if given.get(name) == tuple(shape)],
        missing=[name for name in expected if name not in given],
        unexpected=[name for name in given if name not in expected],
        wrong_shape=[f"{name} is {list(given[name])} instead of {list(expected[name])}" for name in differing],
    )


def check_weights(expected: Mapping[str, tuple[int, ...]], source: Source, advice: str) -> None:
    """See that a source supplies exactly these names in these shapes.

    Args:
        expected: shapes by canonical name.
        source: what is there.
        advice: the likely cause and what to do, for the message.

    Raises:
        WeightsError: anything is missing, unexpected or of another shape.
    """
    problems = str(compare(expected, source))
    if problems:
        raise WeightsError(f"{source.path}: {problems}. {advice}")


def copy_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Stored]) -> None:
    """Read each tensor and copy it into its target, one at a time, in the target's dtype.

    Raises:
        WeightsError: a value does not fit into that dtype.
    """
    with torch.no_grad():
        for name, stored in weights.items():
            targets[name].copy_(convert_tensor(name, stored.read(), targets[name].dtype))
