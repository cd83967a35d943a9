"""Weights that were stored quantized: those with one scale a row or tensor are restored, all others are named.

| stored | restored as |
|---|---|
| `X.weight` int8 with `X.SCB` `[rows]` (bitsandbytes, 8 bit) | `weight * SCB / 127`, a row |
| `X.weight` int8 or fp8 with `X.weight_scale` `[1]`, `[rows]` or `[rows, 1]` (compressed-tensors) | `weight * scale` |

Packed weights (4 bit of bitsandbytes, GPTQ, AWQ) lost more and need their own libraries: an error says which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The end of a name that only such a file has, and what it is; the first that fits.
_PACKED = (
    (".weight.absmax", "quantized to 4 bits by bitsandbytes"),
    (".weight.quant_map", "quantized to 4 bits by bitsandbytes"),
    (".g_idx", "quantized by GPTQ"),
    (".qweight", "quantized by GPTQ or AWQ"),
    (".qzeros", "quantized by GPTQ or AWQ"),
    (".weight_packed", "quantized and packed by compressed-tensors"),
    (".weight_scale_inv", "quantized to fp8 in blocks"),
    (".weight._data", "quantized by quanto"),
)
_SCALES = {".SCB": 1 / 127, ".weight_scale": 1.0}
_NOTES = (".weight_format", ".weight_shape", ".input_scale", ".output_scale")


def dequantized(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """Return the tensors with quantized ones restored in fp32 when they are read, and without their scales.

    Raises:
        WeightsError: they are quantized in a way that is not read here.
    """
    for ending, what in _PACKED:
        packed = [name for name in stored if name.endswith(ending)]
        if packed:
            raise WeightsError(
                f"{path}: weights {what} ({listing(packed)}), which are not read here. Take the model as it was before "
                "(microsoft/phi-2), or write it in 16 bits: "
                "AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(OUT)"
            )
    found = dict(stored)
    for ending, factor in _SCALES.items():
        for name in [name for name in stored if name.endswith(ending)]:
            layer = name.removesuffix(ending)
            weight, scale = stored.get(f"{layer}.weight"), found.pop(name)
            if weight is None or not (weight.dtype == torch.int8 or weight.dtype in _FP8):
                found[name] = scale
                continue
            if scale.numel not in (1, weight.shape[0]):
                raise WeightsError(
                    f"{path}: {name} is {list(scale.shape)} for a weight of {list(weight.shape)}; only one scale a row "
                    "or tensor is read. Take the model as it was before its quantization"
                )
            _check_format(stored.get(f"{layer}.weight_format"), name, path)
            found[f"{layer}.weight"] = Stored(weight.shape, torch.float32, partial(_read, weight, scale, factor))
            for note in _NOTES:
                found.pop(layer + note, None)
    return found


def _check_format(stored: Stored | None, name: str, path: Path) -> None:
    """Check that bitsandbytes has stored rows as rows (format 0), not in the tiles of an old GPU kernel."""
    if stored is not None and stored.numel == 1 and int(stored.read().reshape(())) != 0:
        raise WeightsError(
            f"{path}: the weight of {name} is in a tiled format of an old bitsandbytes; load it there and save it again"
        )


def _read(weight: Stored, scale: Stored, factor: float) -> Tensor:
    values, scales = weight.read().float(), scale.read().float() * factor
    return values * scales.reshape(-1, *[1] * (values.dim() - 1))
