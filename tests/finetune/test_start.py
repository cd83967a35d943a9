"""What a fine-tuning may start from: every form of trained weights, and what is said of anything else."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.verbs import call

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.finetune.start import Start, open_start
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.export import export
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 4 with LoRA of rank 4."""
    folder = tmp_path_factory.mktemp("start") / "run"
    recipe = build_recipe(tiny.recipe(weights, {"none": weights}), "test")
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.text, frozen_dtype=torch.float32)
    state = {name: value for name, value in model.state_dict().items() if is_trainable(name)}
    save_trained(state, model.config, folder / "model", provenance_of(recipe))
    return folder


def builds(start: Start) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = build_model(start.model, start.text, frozen_dtype=torch.float32)
    return dict(model.named_parameters())


def test_a_run(run: Path) -> None:
    start = open_start(run, None, None)
    assert (start.stage, start.model.lora_r, start.model.allow_missing, start.base) == (4, 4, [], ())
    assert (start.text.prompt_template, start.text.end_sym) == ("[INST] {} [/INST]", "###")
    builds(start)


@pytest.mark.parametrize("lora", ["merged", "kept"])
def test_an_exported_folder_alone(run: Path, tmp_path: Path, lora: str) -> None:
    out = tmp_path / "exported"
    call(export, run, "--out", out, "--dtype", "fp32", *(["--keep-lora"] if lora == "kept" else []))
    start = open_start(out, None, None)
    assert (start.whole, start.dtype, start.stage) == (True, "fp32", 4)
    assert start.model.allow_missing == (["lora"] if lora == "merged" else [])
    assert (start.model.lora_r, start.model.lora_alpha, start.model.image_size) == (4, 16.0, tiny.IMAGE_SIZE)
    built = builds(start)
    assert ("lora_A" in "".join(built)) and built["llama_proj.weight"].shape[0] == 24


def test_a_file_of_the_originals_with_its_base_in_a_folder(run: Path, weights: Path, tmp_path: Path) -> None:
    """Base weights are found by the usual names, or by content."""
    file = tmp_path / "checkpoint_9.pth"
    call(export, run, "--to", "original", "--out", file)
    base = tmp_path / "base"
    shutil.copytree(weights / "phi", base / "the-language-model")
    shutil.copy(weights / "eva_vit_g.pth", base / "vision.pth")
    shutil.copy(weights / "blip2_pretrained_flant5xxl.pth", base)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(weights, {"none": weights}))
    start = open_start(file, base, recipe)
    assert [change.partition("=")[0] for change in start.base] == ["model.phi", "model.eva_vit", "model.qformer"]
    assert (Path(start.model.phi).name, Path(start.model.eva_vit).name) == ("the-language-model", "vision.pth")
    (base / "vision.pth").unlink()
    with pytest.raises(WeightsError, match=r"of which 1 are not in .*base:\n  - EVA ViT: .*\n.*--base"):
        open_start(file, base, recipe)


def test_base_weights_are_no_start(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"--from .*phi: Phi alone, .* the place of .* is --base"):
        open_start(weights / "phi", None, None)
    with pytest.raises(WeightsError, match=r"--from .*absent: no such"):
        open_start(tmp_path / "absent", None, None)
