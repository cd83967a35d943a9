"""Training next to frozen layers in fp8: the same trainables, close losses, features, and what it does not go with."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import ended
from helpers.frozen_training import built, check_frozen_weights_stay, trained
from safetensors.torch import load_file

from benchmarks import fp8
from tinygptv_ds.config.load import build_recipe, load_recipe
from tinygptv_ds.config.quantization import check_frozen_bits
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.estimate.data_summary import ASSUMED
from tinygptv_ds.estimate.memory import MicroBatchSize, step_memory
from tinygptv_ds.estimate.model_size import (
    model_configuration,
    parameter_counts,
    parameter_shapes,
    quantized_weights,
    trained_parts,
)
from tinygptv_ds.features.verify import vision_fingerprint
from tinygptv_ds.finetune.devices import Devices, fit
from tinygptv_ds.models.frozen_linear import quantized_buffers
from tinygptv_ds.models.parameters import lora, norms, projections, quantizable
from tinygptv_ds.resources import project_root
from tinygptv_ds.weights.assemble import build_vision

STEPS = 8


def test_losses_are_close_and_frozen_weights_stay(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    whole, _ = trained(raw_recipe(), STEPS)
    for choice in ("vision", "all"):
        losses, model = trained(raw_recipe(model__fp8=choice), STEPS)
        assert losses[-1] < losses[0]
        assert 0 < max(abs(a - b) for a, b in zip(losses, whole, strict=True)) < 0.05
        check_frozen_weights_stay(model, built(raw_recipe(model__fp8=choice)))


def test_the_benchmark(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    """Features are near those of 16 bit, and not the same; the table has means of ten steps and the largest change."""
    found = fp8.cosines(build_recipe(raw_recipe(model__fp8="vision"), "r"), 3)
    assert found.shape == (3,) and 0.99 < found.min() < 1
    losses = {choice: [1.0 + 0.01 * number] * 19 + [2.0] for number, choice in enumerate(fp8.CHOICES)}
    head, _, *rows = fp8.table(losses)
    assert head == "| `model.fp8` | 1 to 10 | 11 to 20 | largest |"
    assert rows[0] == "| `null` | 1.0000 | 1.1000 | 0.0000 |" and rows[2] == "| `all` | 1.0200 | 1.1180 | 0.0200 |"


def test_names_of_all_others_are_the_same(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    whole = dict(built(raw_recipe()).named_parameters())
    for choice, phi in {"vision": False, "all": True}.items():
        model = built(raw_recipe(model__fp8=choice))
        assert {n for n in whole if quantizable(n, vision=True, phi=phi)} == whole.keys() - model.state_dict().keys()
        kept = dict(model.named_parameters())
        assert all(
            torch.equal(p, whole[name]) and p.requires_grad == whole[name].requires_grad for name, p in kept.items()
        )


def test_next_to_bits_of_phi(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    model = built(raw_recipe(model__fp8="vision", model__frozen_bits=8))
    both = {name.rpartition(".")[0] for name in quantized_buffers(model)}
    assert both == {name.rpartition(".")[0] for name in quantized_buffers(built(raw_recipe(model__fp8="all")))}


def test_gradient_checkpointing_is_exact(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    again, _ = trained(raw_recipe(model__fp8="all", model__gradient_checkpointing=True), STEPS)
    assert trained(raw_recipe(model__fp8="all"), STEPS)[0] == again


def test_features_are_of_the_vision_path_that_trains(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    found = {}
    for choice in (None, "vision", "all"):
        recipe = build_recipe(raw_recipe(model__fp8=choice), "r")
        alone = build_vision(recipe.model, recipe.text, frozen_dtype=torch.float32)
        found[choice] = vision_fingerprint(alone, "fp32")
        assert found[choice] == vision_fingerprint(built(raw_recipe(model__fp8=choice)), "fp32")
    assert found["vision"] == found["all"]
    assert found[None] | {"weights": found["all"]["weights"]} == found["all"] and found[None] != found["all"]


def test_a_run(weights: Path, shards: dict[str, Path], tmp_path: Path) -> None:
    """By the command itself: layers and bytes in the log, checkpoints with what is trained alone, ZeRO-3 refused."""
    raw = tiny.recipe(weights, shards, model__fp8="all", train__steps_per_epoch=2)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    run = ended(recipe, tmp_path / "run")
    assert re.search(r"16 linear layers quantized, in [\d.e-]+ GB", run.output)
    stored = load_file(run.folder / "model/trained.safetensors")
    assert stored and all(projections(name) or norms(name) or lora(name) for name in stored)


def test_refusals(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    def refused(words: str, **fields: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            build_recipe(raw_recipe(**{f"model__{name}": value for name, value in fields.items()}), "r")

    refused(r"model.fp8 must be vision, all or null, not", fp8="llm")
    refused(r"fp8: all and model.frozen_bits: 4 both store the weights of Phi", fp8="all", frozen_bits=4)
    ours = {"frozen_bits": 4, "quantize_vision": True}
    refused(r"fp8: vision and model.frozen_bits: 4 both store the weights of the ViT", fp8="vision", **ours)
    refused(r"model.train names vit, .* set model.fp8 to null", fp8="vision", train=["vit"])
    refused(r"model.train names vit, .* set model.fp8 to null", fp8="all", train=["vit"])
    refused(r"model.train names llm, .* set model.fp8 to vision or null", fp8="all", train=["llm"])
    build_recipe(raw_recipe(model__fp8="vision", model__train=["llm"]), "r")
    model = build_recipe(raw_recipe(model__fp8="vision"), "r").model
    with pytest.raises(ConfigError, match=r"zero3.json: ZeRO-3 does not go with model.fp8. .* set model.fp8 to null"):
        check_frozen_bits(model, {"zero_optimization": {"stage": 3}}, "zero3.json")
    check_frozen_bits(model, {"zero_optimization": {"stage": 2}}, "zero2.json")


def test_memory_by_count() -> None:
    """One byte for each weight; nothing is planned that divides them."""
    recipe = load_recipe(project_root() / "stages/stage4.yaml", ["model.fp8=all"])
    config = model_configuration(recipe, {})
    shapes = parameter_shapes(config)
    counted = quantized_weights(shapes, None, vision=False, fp8="all")
    assert counted is not None and counted.stored == counted.count == sum(counted.counts.values())
    both = quantized_weights(shapes, 4, vision=False, fp8="vision")
    assert both is not None and both.count == counted.count and set(both.counts) == {"4 bit", "fp8"}
    batch, parts = MicroBatchSize(2, ASSUMED[4], 0.0), trained_parts(recipe)
    whole, less = (step_memory(config, parameter_counts(shapes), parts, batch, 1, q) for q in (None, counted))
    assert whole["ZeRO-2"].weights - less["ZeRO-2"].weights == counted.count
    assert set(less) == {"ZeRO-1", "ZeRO-2"}


def test_finetune_plans_no_zero_3() -> None:
    """Where nothing else fits, the plain recipe is divided among the ranks, and this one refused."""
    recipe = load_recipe(project_root() / "stages/stage4.yaml", ["model.fp8=all", "train.batch_size=16"])
    assert fit(recipe, Devices(2, 24, "a GPU")).deepspeed == "zero2_bf16.json"
    small = Devices(2, 5, "a GPU", quantizes=False)
    with pytest.raises(ConfigError, match="does not fit"):
        fit(recipe, small)
    plain = replace(recipe, model=replace(recipe.model, fp8=None))
    assert fit(plain, small).deepspeed in ("zero3_bf16.json", "zero3_offload.json")
