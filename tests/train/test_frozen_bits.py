"""Training next to quantized frozen weights: the same trainables, close losses, ZeRO, resume, export and features."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import Ranks, ended
from helpers.frozen_training import built, check_frozen_weights_stay, trained
from helpers.launcher import ZERO_3
from helpers.verbs import call
from safetensors.torch import load_file

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.features import compute as make_features
from tinygptv_ds.models.parameters import quantizable
from tinygptv_ds.train.checkpoint.storage import TENSORS
from tinygptv_ds.weights.export.hf import export_hf
from tinygptv_ds.weights.resolve import resolve

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is an extra")

STEPS, HALF = 8, 4
BITS = {"model__frozen_bits": 4, "model__quantize_vision": True}
WITHIN = {None: 0.0, 8: 0.02, 4: 0.2}  # of the losses, which are about 6; the weights are random and 32 wide


@pytest.fixture(scope="module")
def recipe(weights: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tiny.recipe(
        weights,
        shards,
        **BITS,
        train__steps_per_epoch=STEPS,
        train__checkpoint_every=HALF,
        train__validate_every=HALF,
        data__validation=[{"name": "held_out", "shards": str(shards["vqa"])}],
    )
    return tiny.write_recipe(tmp_path_factory.mktemp("bits") / "recipe.yaml", raw)


@pytest.fixture(scope="module")
def one_rank(recipe: Path) -> Ranks:
    return ended(recipe, recipe.parent / "one")


@pytest.mark.parametrize("bits", [8, 4])
def test_losses_are_close_and_frozen_weights_stay(bits: int, raw_recipe: Callable[..., dict[str, Any]]) -> None:
    whole, _ = trained(raw_recipe())
    losses, model = trained(raw_recipe(model__frozen_bits=bits, model__quantize_vision=True))
    assert whole[-1] < whole[0]
    assert 0 < max(abs(a - b) for a, b in zip(losses, whole, strict=True)) < WITHIN[bits]
    check_frozen_weights_stay(model, built(raw_recipe(model__frozen_bits=bits, model__quantize_vision=True)))


def test_trainables_are_the_same(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    whole, quantized = built(raw_recipe()), built(raw_recipe(**BITS))
    of_whole, of_quantized = (
        {name: p for name, p in model.named_parameters() if p.requires_grad} for model in (whole, quantized)
    )
    assert of_whole.keys() == of_quantized.keys()
    assert all(torch.equal(p, of_quantized[name]) and p.dtype == torch.float32 for name, p in of_whole.items())
    gone = {name for name, _ in whole.named_parameters()} - {name for name, _ in quantized.named_parameters()}
    assert gone == {name for name, _ in whole.named_parameters() if quantizable(name, vision=True)}


def test_gradient_checkpointing_is_exact(raw_recipe: Callable[..., dict[str, Any]]) -> None:
    plain, _ = trained(raw_recipe(**BITS))
    again, _ = trained(raw_recipe(**BITS, model__gradient_checkpointing=True))
    assert plain == again


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_give_the_same_run(recipe: Path, one_rank: Ranks, stage: int) -> None:
    options = ("--set", f"deepspeed.zero_optimization.stage={stage}")
    two = ended(recipe, recipe.parent / f"zero{stage}", *options, ranks=2)
    for number in ("train/loss", "train/grad_norm"):
        ours, theirs = ([line[number] for line in run.metrics if number in line] for run in (two, one_rank))
        assert len(ours) == STEPS and ours == pytest.approx(theirs, rel=1e-5)
    assert [line["val/loss"] for line in one_rank.metrics if "val/loss" in line]
    assert re.search(r"16 linear layers quantized, in [\d.e-]+ GB", one_rank.output)


def test_a_resumed_run_is_the_unbroken_one(recipe: Path, one_rank: Ranks) -> None:
    folder = recipe.parent / "resumed"
    middle = one_rank.folder / f"checkpoints/step-{HALF:08}"
    ended(recipe, folder, "--resume", str(middle))
    ours, theirs = (load_file(f / "model/trained.safetensors") for f in (folder, one_rank.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    stored = load_file(middle / TENSORS)
    kinds = {name.partition("/")[0] for name in stored}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} and {n.partition("/")[2] for n in stored} == ours.keys()
    other = ended(recipe, recipe.parent / "other", "--resume", str(middle), "--set", "model.frozen_bits=8", code=2)
    assert "model.frozen_bits: 4 in the checkpoint, 8 here" in other.output


def test_export_merges_into_the_whole_base_weights(one_rank: Ranks, tmp_path: Path) -> None:
    """Not into the quantized ones: each exported weight is the file's own plus LoRA, to rounding."""
    resolved = resolve(one_rank.folder)
    export_hf(resolved, tmp_path / "model", dtype=torch.float32)
    exported = load_file(tmp_path / "model/model.safetensors")
    weights, config = resolved.weights(), resolved.config
    for name in filter(lambda name: quantizable(name, vision=True), weights):
        expected = weights[name].read().float()
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in weights:
            a, b = (weights[f"{layer}.lora_{letter}.weight"].read().float() for letter in "AB")
            assert b.any()
            expected = expected + b @ a * (config.lora_alpha / config.lora_r)
        torch.testing.assert_close(exported[name], expected, rtol=1e-5, atol=1e-6)


def test_refusals(recipe: Path, raw_recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended(recipe, recipe.parent / "refused", ZERO_3, code=2)
    assert "ZeRO-3 does not go with model.frozen_bits. It divides parameters" in run.output
    for part, remedy in {"llm": "model.frozen_bits to null", "vit": "model.quantize_vision to false"}.items():
        with pytest.raises(ConfigError, match=rf"model.train names {part}, .* or set {remedy}"):
            build_recipe(raw_recipe(**BITS, model__train=[part]), "r")
    build_recipe(raw_recipe(model__frozen_bits=4, model__train=["vit", "lora"]), "r")
    with pytest.raises(ConfigError, match=r"model.frozen_bits must be 4, 8 or null"):
        build_recipe(raw_recipe(model__frozen_bits=5), "r")
    with pytest.raises(ConfigError, match=r"quantize_vision needs model.frozen_bits"):
        build_recipe(raw_recipe(model__quantize_vision=True), "r")


def test_features_are_of_the_vision_path_that_trains(recipe: Path, raw_recipe: Callable[..., Any]) -> None:
    """Those of the 16-bit ViT are refused with a quantized one, and its own give the same losses."""
    for name, sets in {"whole": ("--set", "model.quantize_vision=false"), "own": ()}.items():
        call(make_features, recipe, "--out", recipe.parent / name, "--workers", 0, *sets)
    options = {name: ("--set", f"data.features={recipe.parent / name}") for name in ("whole", "own")}
    held_out = ("--set", "data.validation=[]", "--set", "train.validate_every=0")
    pixels = ended(recipe, recipe.parent / "pixels", *held_out)
    cached = ended(recipe, recipe.parent / "cached", *held_out, *options["own"])
    losses = [[line["train/loss"] for line in run.metrics] for run in (pixels, cached)]
    assert losses[0] == losses[1]
    run = ended(recipe, recipe.parent / "stale", *held_out, *options["whole"], code=2)
    assert "weights" in run.output


def test_without_bitsandbytes(raw_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygptv_ds.config import quantization

    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    model = build_recipe(raw_recipe(**BITS), "r").model
    with pytest.raises(ConfigError, match=r"4 bits need bitsandbytes: pip install -r requirements-quant.txt"):
        quantization.check_frozen_bits(model, {}, "cpu.json")
    quantization.check_frozen_bits(build_recipe(raw_recipe(), "r").model, {}, "cpu.json")
