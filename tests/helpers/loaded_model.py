"""A tiny trained run, its exported folder, and the model in memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import tiny
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.generate.load import LoadedModel, load_model
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.export.hf import export_hf
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.trained import save_trained


@pytest.fixture(scope="session")
def tiny_recipe(weights: Path) -> Recipe:
    return build_recipe(tiny.recipe(weights, {"vqa": Path("vqa")}), "the tests' recipe")


@pytest.fixture(scope="session")
def trained_run(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose LoRA and norms are far from where they began."""
    torch.manual_seed(3)
    model = build_model(tiny_recipe.model, tiny_recipe.text, frozen_dtype=torch.float32)
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters() if is_trainable(name)}
    for tensor in state.values():
        tensor.add_(torch.randn(tensor.shape) * 0.3)
    run = tmp_path_factory.mktemp("trained") / "run"
    run.mkdir()
    save_trained(state, model.config, run / "model", provenance_of(tiny_recipe))
    return run


@pytest.fixture(scope="session")
def exported(trained_run: Path) -> Path:
    """The same with LoRA merged, in fp32."""
    out = trained_run.with_name("exported")
    export_hf(resolve(trained_run), out, dtype=torch.float32)
    return out


@pytest.fixture(scope="session")
def loaded(exported: Path) -> LoadedModel:
    return load_model(exported, torch.float32)
