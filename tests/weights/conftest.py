"""A tiny model with random values everywhere, and files of its weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.weight_layouts import blip2_state, eva_state, phi_state, save_phi, tiny_config
from torch import Tensor

from tinygptv_ds.config.data_section import DataSection, DatasetSection
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.recipe import ModelSection, Recipe, TextSection
from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained


@pytest.fixture
def reference() -> TinyGPTVForConditionalGeneration:
    torch.manual_seed(0)
    model = TinyGPTVForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def values(reference: TinyGPTVForConditionalGeneration) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in reference.named_parameters()}


@pytest.fixture
def trained(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in values.items() if is_trainable(name)}


@pytest.fixture
def base(tmp_path: Path, values: dict[str, Tensor]) -> Callable[..., ModelSection]:
    """Writes the three base files, each state changed by a function where wanted, and gives a section naming them."""

    def write(
        phi: Callable = dict,
        eva: Callable = dict,
        qformer: Callable = dict,
        layout: str = "split",
        phi_folder: Path | None = None,
        qformer_file: Path | None = None,
        **section: object,
    ) -> ModelSection:
        folder = tmp_path / "base"
        save_phi(folder / "phi", phi(phi_state(values, layout)))
        torch.save(eva(eva_state(values)), folder / "eva_vit_g.pth")
        torch.save({"model": qformer(blip2_state(values))}, folder / "blip2.pth")
        sizes = {"image_size": 28, "eva_vit_depth": 2, "eva_vit_heads": 2, "qformer_heads": 2, "proj_hidden_size": 5}
        paths = {
            "phi": phi_folder or folder / "phi",
            "eva_vit": folder / "eva_vit_g.pth",
            "qformer": folder / "blip2.pth",
        }
        return ModelSection(**{k: str(v) for k, v in paths.items()}, **{**sizes, **section})

    return write


@pytest.fixture
def run(base: Callable[..., ModelSection], trained: dict[str, Tensor], tmp_path: Path) -> Path:
    """A finished run of stage 4 on these base weights."""
    recipe = Recipe(
        stage=4,
        model=base(lora_r=3, lora_alpha=6.0),
        text=TextSection(prompt_template="[INST] {} [/INST]", end_sym="###"),
        data=DataSection([DatasetSection("x", "x")]),
        optimizer=OptimizerSection(lr=1.0, min_lr=1.0),
        train=TrainSection(batch_size=1, micro_batch_size=1),
    )
    save_trained(trained, tiny_config(), tmp_path / "run/model", provenance_of(recipe))
    return tmp_path / "run"
