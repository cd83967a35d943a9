"""The export of trained weights as a `.pth` that the original's code loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygptv_ds.files import whole_file
from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.detect import Opened
from tinygptv_ds.weights.io import Stored
from tinygptv_ds.weights.layouts.expected_shapes import expected_shapes, in_order
from tinygptv_ds.weights.layouts.tinygptv import BUFFER, BUFFER_LENGTH, original_name
from tinygptv_ds.weights.safetensors_writer import convert_tensor, stored_dtype
from tinygptv_ds.weights.source import Source, check_weights

# The order of the parts in the original's model: its own parameters first, then its modules as it creates them.
_PARTS = ("query_tokens", "llama_model.", "visual_encoder.", "ln_vision.", BUFFER, "Qformer.", "llama_proj")


def export_original(opened: Opened, trained: Source, out: Path, *, dtype: torch.dtype | None) -> None:
    """Write a `.pth` as the original's code saves it, with the same names under "model".

    Args:
        opened: where the weights are from; what else a file of the original holds (optimizer, epoch, ...) is copied.
        trained: the trained weights.
        out: the file.
        dtype: of the weights; None keeps each one's own.

    Raises:
        WeightsError: the weights are not complete.
    """
    expected = expected_shapes("trained", trained)
    check_weights(
        expected,
        trained,
        "The original's code needs all trained weights",
    )
    with_lora = any(map(lora, trained.weights))
    state = {
        original_name(name, lora=with_lora): _read(name, trained.weights[name], dtype)
        for name in in_order(trained.weights, expected)
    }
    state[BUFFER] = torch.arange(BUFFER_LENGTH)[None]
    content = {"model": dict(sorted(state.items(), key=_place)), **_materialised(_of_the_original(opened))}
    with whole_file(out) as partial:
        torch.save(content, partial)


def _place(item: tuple[str, Tensor]) -> int:
    return next(number for number, part in enumerate(_PARTS) if item[0].startswith(part))


def _of_the_original(opened: Opened) -> Mapping[str, Any]:
    """Return what one of the original's files holds next to "model"."""
    return opened.notes if opened.path.is_file() else {}


def _materialised(content: Any) -> Any:
    """Return the same content with every stored tensor read."""
    if isinstance(content, Stored):
        return content.read()
    if isinstance(content, Mapping):
        return {key: _materialised(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_materialised, content))
    return content


def _read(name: str, stored: Stored, dtype: torch.dtype | None) -> Tensor:
    return convert_tensor(name, stored.read(), stored_dtype(stored, dtype)).contiguous()
