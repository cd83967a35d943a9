"""LoRA merged into the weights that it adapts, or left out of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.io import Stored

_A = ".lora_A.weight"


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return `W + scaling * B A`, computed in fp32."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling)


def merge_lora(weights: Mapping[str, Stored], config: TinyGPTVConfig) -> dict[str, Stored]:
    """Return the weights of the same model without LoRA; each merged one is computed in fp32 when it is read.

    Args:
        weights: all weights by canonical name.
        config: the model's, for LoRA's scale.
    """
    merged = without_lora(weights)
    for name in weights:
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            parts = (weights[f"{layer}.weight"], weights[name], weights[f"{layer}.lora_B.weight"])
            read = partial(_read_merged, parts, config.lora_alpha / config.lora_r)
            merged[f"{layer}.weight"] = Stored(parts[0].shape, torch.float32, read)
    return merged


def without_lora(weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the weights without LoRA's A and B: those of the base that LoRA is added to."""
    return {name: stored for name, stored in weights.items() if not lora(name)}


def _read_merged(parts: tuple[Stored, Stored, Stored], scaling: float) -> Tensor:
    weight, lora_a, lora_b = (part.read() for part in parts)
    return merged_weight(weight, lora_a, lora_b, scaling)
