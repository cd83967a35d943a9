"""The vision tower gives the original's features, also from a file with further tensors and at another image size."""

from pathlib import Path

import pytest
import torch
from helpers.golden_model import HIDDEN, read, tensors
from safetensors.torch import save_file

from tinygptv_ds.models.eva_vit import build_eva_vit, interpolate_pos_embed
from tinygptv_ds.weights.layouts.eva import PREFIX, eva_config, eva_source
from tinygptv_ds.weights.source import check_weights, copy_weights


def load(path: Path, config: dict, image_size: int) -> tuple[torch.nn.Module, list[str]]:
    vision = eva_config(path, image_size=image_size, depth=config["depth"], heads=config["num_heads"])
    source = eva_source(path, vision)
    model = build_eva_vit(vision)
    parameters = {PREFIX + name: p for name, p in model.named_parameters()}
    check_weights({name: tuple(p.shape) for name, p in parameters.items()}, source, "")
    copy_weights(parameters, source.weights)
    return model.eval(), source.ignored


def assert_features(folder: Path, model: torch.nn.Module, expected: dict) -> None:
    norm = tensors(folder / "ln_vision.safetensors")
    with torch.no_grad():
        features = model.forward_features(expected["images"])
        normed = torch.nn.functional.layer_norm(
            features, features.shape[-1:], norm["ln_vision.weight"], norm["ln_vision.bias"], 1e-5
        )
    torch.testing.assert_close(features, expected["visual_encoder_output"], **HIDDEN)
    torch.testing.assert_close(normed, expected["ln_vision_output"], **HIDDEN)


@pytest.mark.parametrize("more", [False, True])
def test_forward(golden: Path, more: bool) -> None:
    """The weights may come alone, or in a file with additional blocks, norm and head, like the published one."""
    folder = golden / "eva_vit"
    config = read(folder / "config.json")
    model, ignored = load(published(folder) if more else folder / "weights.safetensors", config, config["img_size"])
    assert_features(folder, model, tensors(folder / "forward.safetensors"))
    assert sorted(ignored) == (sorted(config["checkpoint_extra_keys"]) if more else [])


def published(folder: Path) -> Path:
    (file,) = folder.glob("checkpoint*.safetensors")
    return file


def test_sizes_from_shapes(golden: Path) -> None:
    config = read(golden / "eva_vit/config.json")
    path = golden / "eva_vit/weights.safetensors"
    found = eva_config(path, image_size=config["img_size"], depth=config["depth"], heads=config["num_heads"])
    sizes = found.hidden_size, found.intermediate_size, found.patch_size
    assert sizes == (config["embed_dim"], config["mlp_hidden"], config["patch_size"])


def test_positions_for_another_image_size(golden: Path, tmp_path: Path) -> None:
    folder = golden / "eva_vit"
    config, expected = read(folder / "config.json"), tensors(folder / "interpolate.safetensors")
    patches = expected["pos_embed_out"].shape[1] - 1
    resized = interpolate_pos_embed(expected["pos_embed_in"], patches)
    torch.testing.assert_close(resized, expected["pos_embed_out"], rtol=0, atol=1e-6)

    stored = tensors(published(folder)) | {"pos_embed": expected["pos_embed_in"]}
    save_file(stored, tmp_path / "eva.safetensors")
    model, _ = load(tmp_path / "eva.safetensors", config, config["interpolate"]["to_image_size"])
    assert_features(folder, model, expected)
