"""LoRA on the fused qkv and dense layers gives the losses and gradients of peft on the same weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import build_model

INPUTS = {
    "input_ids": torch.tensor([3, 7, 11, 2, 5, 6, 9]),
    "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2]),
    "cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32),
    "max_seqlen": 4,
    "target_rows": torch.tensor([1, 2, 4, 5]),
    "targets": torch.tensor([11, 2, 6, 9]),
}
TARGETS = r"language_model\..*\.(query_key_value|dense)"  # the Q-Former has layers called dense, too


def build(raw: dict[str, Any]) -> TinyGPTVForConditionalGeneration:
    recipe = build_recipe(raw, "test")
    torch.manual_seed(0)
    return build_model(recipe.model, recipe.text, frozen_dtype=torch.float32)


def test_losses_and_gradients(raw_recipe: Callable[..., dict[str, Any]], weights: Path) -> None:
    ours = build(raw_recipe(model__lora_r=4, model__lora_alpha=6))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)  # zeros would show nothing
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=TARGETS)
    theirs = inject_adapter_in_model(config, build(raw_recipe(model__lora_r=0)))
    values = dict(ours.named_parameters())
    adapted = {name: ours_name(name) for name, _ in theirs.named_parameters()}
    assert set(adapted.values()) == values.keys()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(values[adapted[name]])
    losses = {}
    for model in (ours, theirs):
        losses[model] = model(**INPUTS).token_losses
        losses[model].sum().backward()
    torch.testing.assert_close(losses[ours], losses[theirs])
    compared = 0
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(
                values[adapted[name]].grad, parameter.grad, msg=lambda text, n=name: f"{n}: {text}"
            )
            compared += parameter.grad.abs().max() > 0
    assert compared == 2 * 2 * 2  # A and B on two layers of two blocks


def ours_name(name: str) -> str:
    """Return the package's name of a parameter from peft's."""
    return re.sub(r"\.(base_layer|default)\.", ".", name)
