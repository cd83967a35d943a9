"""An exported model alone is enough to start a stage from: its folder stands for each of the base models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.verbs import call

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.export import export as export_verb

FP32 = torch.float32


def named_throughout(section: ModelSection, folder: Path) -> ModelSection:
    place = str(folder)
    return replace(
        section,
        phi=place,
        eva_vit=place,
        qformer=place,
        init_from=place,
        allow_missing=["lora"],
        lora_r=2,
        lora_alpha=4,
    )


def test_a_model_with_merged_lora_starts_as_it_is(base: Callable[..., ModelSection], run: Path, tmp_path: Path) -> None:
    call(export_verb, run, "--out", tmp_path / "merged", "--dtype", "fp32")
    built = build_model(named_throughout(base(), tmp_path / "merged"), TextSection(), frozen_dtype=FP32)
    whole = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=FP32)
    ours, theirs = dict(built.named_parameters()), dict(whole.named_parameters())
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    added = ours.keys() - theirs.keys()
    assert added and all(".lora_" in name for name in added)
    assert not any(ours[name].any() for name in added if ".lora_B." in name)  # so that it changes nothing at first


def test_lora_must_be_in_the_base_that_is_used(base: Callable[..., ModelSection], run: Path, tmp_path: Path) -> None:
    call(export_verb, run, "--out", tmp_path / "merged")
    call(export_verb, run, "--out", tmp_path / "dropped", "--drop-lora")
    other = replace(named_throughout(base(), tmp_path / "merged"), phi=str(tmp_path / "base/phi"))
    for section in (other, named_throughout(base(), tmp_path / "dropped")):
        with pytest.raises(WeightsError, match="from which a stage cannot start"):
            build_model(section, TextSection(), frozen_dtype=FP32)
