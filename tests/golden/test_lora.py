"""LoRA on the fused qkv and dense layers gives what peft computed for the original."""

from pathlib import Path

import pytest
import torch
from helpers.golden_model import LOSS, fill, read, tensors
from test_phi import (
    assert_outputs,
    assert_packed,
    gradients_of,
    hidden_states,
    inputs,
    labels_of,
    load_language_model,
    padded_loss,
)

from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.merge_lora import merge_lora
from tinygptv_ds.weights.source import Source


@pytest.fixture
def model(golden: Path) -> TinyGPTVForConditionalGeneration:
    return load_language_model(golden / "lora")


@pytest.fixture
def expected(golden: Path, lora_case: str) -> dict:
    return tensors(golden / f"lora/{lora_case}.safetensors")


def run_padded(model: TinyGPTVForConditionalGeneration, expected: dict) -> tuple:
    embeds, mask = inputs(model, expected)
    states = hidden_states(model, embeds, mask)
    logits = model.language_model.lm_head(states[-1])
    return embeds, mask, (states, logits, padded_loss(logits, labels_of(expected)))


def test_padded(golden: Path, model: TinyGPTVForConditionalGeneration, expected: dict, lora_case: str) -> None:
    embeds, mask, outputs = run_padded(model, expected)
    gradients = gradients_of(golden / "lora", lora_case, expected)
    assert_outputs(model, expected, gradients, embeds, outputs, mask)


def test_packed(golden: Path, model: TinyGPTVForConditionalGeneration, expected: dict, lora_case: str) -> None:
    assert_packed(model, expected, gradients_of(golden / "lora", lora_case, expected))


def test_merged(golden: Path, model: TinyGPTVForConditionalGeneration, expected: dict) -> None:
    """Merged weights give the loss with adapters; the base weights give the loss without."""
    config = read(golden / "lora/config.json")
    weights = merge_lora({name: in_memory(p.detach()) for name, p in model.named_parameters()}, model.config)
    plain = model.config.__class__.from_dict(model.config.to_dict() | {"lora_r": 0})
    merged = TinyGPTVForConditionalGeneration(plain).eval()
    fill(merged, Source(golden, weights, []))
    assert not any("lora" in name for name in weights)
    loss = run_padded(merged, expected)[2][2].item()
    assert loss == pytest.approx(config["loss_with_adapters"], rel=LOSS["rtol"])
    assert loss != pytest.approx(config["loss_without_adapters"], rel=1e-3)


def test_zero_b_is_the_base(golden: Path, model: TinyGPTVForConditionalGeneration, expected: dict) -> None:
    config = read(golden / "lora/config.json")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    loss = run_padded(model, expected)[2][2].item()
    assert loss == pytest.approx(config["loss_without_adapters"], rel=LOSS["rtol"])
