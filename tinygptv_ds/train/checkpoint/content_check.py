"""What a checkpoint holds, checked before a run resumes from it: its hashes only show that it is what was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tinygptv_ds.errors import CheckpointError
from tinygptv_ds.train.checkpoint.folders import is_complete, step_of
from tinygptv_ds.train.checkpoint.storage import STATE
from tinygptv_ds.train.engine import MOMENTS

_KINDS = ("weight", *MOMENTS)
_SCALES = (2.0**-126, 2.0**127)  # loss scales that fp32 can hold


def check_state(folder: Path, state: dict[str, Any]) -> None:
    """Check the values of `state.json`.

    Raises:
        CheckpointError: a value makes no sense; names the file, the key and the value.
    """
    where = folder / STATE
    step = _whole(where, state, "step", least=1, most=None)
    if is_complete(folder) and step != step_of(folder):
        raise CheckpointError(f"{where}: step is {step}, but the folder is named {folder.name}")
    for key in ("optimizer_steps", "image_steps", "skipped_steps"):
        if key == "optimizer_steps" or key in state:  # the others are missing in those of version 0.1
            _whole(where, state, key, least=0, most=step)
    scale, must_match = state["loss_scale"], state["must_match"]
    if scale is not None and not _is_loss_scale(scale):
        raise CheckpointError(f"{where}: loss_scale is {scale!r}, not null or a scale and the steps since it changed")
    if must_match is not None and not isinstance(must_match, dict):
        raise CheckpointError(f"{where}: must_match is a {type(must_match).__name__}, not the values to compare")


def check_tensors(file: Path) -> None:
    """Check that weights and both moments of the same parameters are there, in fp32, of the same shapes, and finite.

    Raises:
        CheckpointError: names the file, the tensor and what is wrong with it.
    """
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:  # its hash is right, so it was written like this
        raise CheckpointError(f"{file} is no safetensors file: {error}") from None
    with opened as tensors:
        keys = set(tensors.keys())
        names = sorted({key.partition("/")[2] for key in keys})
        wanted = {f"{kind}/{name}" for name in names for kind in _KINDS}
        if keys != wanted:
            missing, odd = sorted(wanted - keys)[:3], sorted(keys - wanted)[:3]
            found = f"lacks {missing}" if missing else f"holds {odd}, which is no part of a checkpoint"
            raise CheckpointError(f"{file} {found}")
        for name in names:
            _check_parameter(file, name, {kind: tensors.get_tensor(f"{kind}/{name}") for kind in _KINDS})


def _check_parameter(file: Path, name: str, tensors: dict[str, Any]) -> None:
    for kind, tensor in tensors.items():
        if str(tensor.dtype) != "torch.float32":
            raise CheckpointError(f"{file}: {kind}/{name} is {tensor.dtype}, not torch.float32")
        if tensor.shape != tensors["weight"].shape:
            raise CheckpointError(
                f"{file}: {kind}/{name} is {list(tensor.shape)}, its weight {list(tensors['weight'].shape)}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {kind}/{name} holds NaN or Inf, from which no training can continue")
    if tensors[MOMENTS[1]].lt(0).any():
        raise CheckpointError(f"{file}: {MOMENTS[1]}/{name} holds negative values, which no square can be")


def _whole(where: Path, state: dict[str, Any], key: str, *, least: int, most: int | None) -> int:
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise CheckpointError(f"{where}: {key} is {value!r}, not a whole number {bounds}")
    return value


def _is_loss_scale(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(part, bool) for part in value):
        return False
    scale, steps = value
    fits = isinstance(scale, int | float) and math.isfinite(scale) and _SCALES[0] <= scale <= _SCALES[1]
    return fits and isinstance(steps, int) and steps >= 0
