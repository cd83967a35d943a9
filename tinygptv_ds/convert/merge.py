"""LoRA merged into the weights that it adapts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A`, computed in fp32, in the dtype of W."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling).to(weight.dtype)


def merge_lora(model: TinyGPTVForConditionalGeneration) -> None:
    """Replace every LoRA layer by a plain one with the merged weight, in place; `config.lora_r` becomes 0."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        weight = merged_weight(
            layer.weight.detach(), layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.scaling
        )
        plain.weight, plain.bias = nn.Parameter(weight), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    model.config.lora_r = 0
