"""Fine-tuning the first released stage 4, whose Q-Former had been trained: it stays part of the model to the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.forked import ended
from helpers.launcher import ROOT
from safetensors.torch import load_file
from torch import Tensor

from tinygptv_ds.cli import main
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.weights.assemble import build_model, meta_model, model_config
from tinygptv_ds.weights.layouts.tinygptv import original_name
from tinygptv_ds.weights.resolve import resolve, resolve_trained

QFORMER = ("qformer.", "query_tokens")


def first_release(recipe: Path, file: Path) -> dict[str, Tensor]:
    """Write such a file with random values; return its Q-Former by canonical name."""
    loaded = load_recipe(recipe)
    torch.manual_seed(3)
    values = {
        name: 0.1 * torch.randn(parameter.shape)
        for name, parameter in meta_model(model_config(loaded.model, loaded.text)).named_parameters()
        if is_trainable(name) or name.startswith(QFORMER)
    }
    torch.save({"model": {original_name(name, lora=True): tensor for name, tensor in values.items()}}, file)
    return {name: tensor for name, tensor in values.items() if name.startswith(QFORMER)}


def test_its_q_former(recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v0 = tmp_path / "v0.pth"
    qformer = first_release(recipe_file(), v0)
    recipe = recipe_file(model__init_from=str(v0), train__steps_per_epoch=2, train__checkpoint_every=1)
    done = ended(recipe, tmp_path / "run")
    trained = load_file(done.folder / "model/trained.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in qformer.items())

    monkeypatch.chdir(ROOT)
    checkpoint = done.folder / "checkpoints/step-00000001"
    for path in (done.folder, checkpoint):
        weights = resolve(path).weights()
        assert all(torch.equal(weights[name].read(), tensor) for name, tensor in qformer.items()), path
    # The next stage from the checkpoint, which holds only what this one trains.
    loaded = load_recipe(recipe, [f"model.init_from={checkpoint}"])
    model = build_model(loaded.model, loaded.text, frozen_dtype=torch.float32)
    assert model.frozen_updates.keys() == qformer.keys()
    main(["convert", str(checkpoint), "--out", str(tmp_path / "converted.safetensors")])
    assert qformer.keys() <= load_file(tmp_path / "converted.safetensors").keys()
    v0.unlink()
    assert resolve(done.folder).weights()["query_tokens"].read().equal(qformer["query_tokens"])
    with pytest.raises(WeightsError, match=r"started from .*v0\.pth, which may hold more than this stage trains"):
        resolve_trained(checkpoint)
