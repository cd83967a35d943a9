"""Tensors under canonical names that one file supplies, checked by name and shape before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.weights.io import Stored, listing
from tinygptv_ds.weights.safetensors_writer import convert_tensor


@dataclass(frozen=True)
class Source:
    """The weights that one file or folder supplies to the model.

    Attributes:
        path: the file or folder.
        weights: tensors by canonical name.
        ignored: names in the file that are known and that the model does not need.
    """

    path: Path
    weights: dict[str, Stored]
    ignored: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by canonical name."""
        return {name: stored.shape for name, stored in self.weights.items()}

    @property
    def frozen_updates(self) -> list[str]:
        """Names of trained weights that the published stages keep frozen; they replace those of the base models."""
        return [name for name in self.weights if not is_trainable(name)]


def rename_all(
    stored: Mapping[str, Stored], outside: Sequence[str], rename: Callable[[str], str | None], path: Path
) -> Source:
    """Give every tensor its canonical name; those whose new name is None are ignored, like the names `outside`.

    Raises:
        WeightsError: two tensors get the same name.
    """
    weights: dict[str, Stored] = {}
    ignored = list(outside)
    for name, tensor in stored.items():
        canonical = rename(name)
        if canonical is None:
            ignored.append(name)
        elif canonical in weights:
            raise WeightsError(f"{path}: two tensors are both {canonical}; the file mixes two layouts")
        else:
            weights[canonical] = tensor
    return Source(path, weights, ignored)


def lora_rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return LoRA's rank from the shapes of its A matrices; 0 if there are none."""
    return max((shape[0] for name, shape in shapes.items() if ".lora_A." in name), default=0)


@dataclass(frozen=True)
class Match:
    """How the names and shapes of a source compare with the expected ones.

    Attributes:
        matched: expected names with the expected shape.
        missing: expected names that the source lacks.
        unexpected: names in the source that are not expected.
        wrong_shape: a sentence with name, shape found and shape expected for each that differs.
        not_float: a sentence with name and dtype for each that holds integers, so its scale is missing.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]
    not_float: list[str]

    def __str__(self) -> str:
        problems = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": self.wrong_shape}
        if self.not_float:
            problems["integers without the scale that they were quantized with"] = self.not_float
        return "; ".join(f"{what}: {listing(names)}" for what, names in problems.items() if names)


def compare(expected: Mapping[str, tuple[int, ...]], source: Source) -> Match:
    """Compare a source's names and shapes with expected ones; `str` of the result is "" if all agree."""
    given = source.shapes
    expected_here = {name: source.weights[name] for name in expected if name in given}
    differing = [name for name, shape in expected.items() if given.get(name, shape) != tuple(shape)]
    return Match(
        matched=[name for name, shape in expected.items() if given.get(name) == tuple(shape)],
        missing=[name for name in expected if name not in given],
        unexpected=[name for name in given if name not in expected],
        wrong_shape=[f"{name} is {list(given[name])} instead of {list(expected[name])}" for name in differing],
        not_float=[
            f"{name} is {str(stored.dtype).removeprefix('torch.')}"
            for name, stored in expected_here.items()
            if not stored.dtype.is_floating_point
        ],
    )


def check_weights(expected: Mapping[str, tuple[int, ...]], source: Source, advice: str) -> None:
    """Check that a source supplies exactly these names in these shapes.

    Args:
        expected: shapes by canonical name.
        source: what the file holds.
        advice: the likely cause and the remedy, for the error.

    Raises:
        WeightsError: anything is missing, unexpected or of another shape.
    """
    problems = str(compare(expected, source))
    if problems:
        raise WeightsError(f"{source.path}: {problems}. {advice}")


def copy_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Stored]) -> None:
    """Read the tensors one at a time and copy each into its target, in the target's dtype.

    Raises:
        WeightsError: a value does not fit into that dtype.
    """
    with torch.no_grad():
        for name, stored in weights.items():
            targets[name].copy_(convert_tensor(name, stored.read(), targets[name].dtype))
