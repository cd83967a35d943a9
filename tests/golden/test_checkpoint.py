"""Checkpoints as the original saves them: names, loss after loading, and one more step with the restored optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_model import LOSS, full_model, pack_layout, read, tensors
from helpers.verbs import call
from helpers.weight_layouts import load_into
from torch import Tensor

from tinygptv_ds.models.parameters import lora, norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights import convert
from tinygptv_ds.weights.export import export
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.inspect import inspect
from tinygptv_ds.weights.layouts.tinygptv import canonical_name
from tinygptv_ds.weights.torch_file import load_torch


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "checkpoint"


@pytest.fixture
def expected(folder: Path) -> dict:
    return read(folder / "expected.json")


@pytest.fixture
def file(folder: Path) -> Path:
    (file,) = folder.glob("*.pth")
    return file


@pytest.fixture
def model(golden: Path, expected: dict) -> TinyGPTVForConditionalGeneration:
    return full_model(golden / expected["goes_with"].split()[0])


def loss_of(model: TinyGPTVForConditionalGeneration, golden: Path, expected: dict) -> Tensor:
    path = golden / expected["goes_with"].split()[-1]
    case, batch = read(path.with_suffix(".json")), tensors(path.with_suffix(".safetensors"))
    packed = pack_layout(case, batch["attention_mask"], batch["targets"], model.config.image_token_id)
    return model(pixel_values=batch["image"], **packed.inputs).token_losses.mean()


def test_keys(file: Path, expected: dict) -> None:
    stored = open_weights(file)
    listed = {entry["name"]: tuple(entry["shape"]) for entry in expected["model_keys"]}
    assert {name: tensor.shape for name, tensor in stored.items()} == listed


def test_loss_after_loading(golden: Path, file: Path, model: TinyGPTVForConditionalGeneration, expected: dict) -> None:
    before = loss_of(model, golden, expected).item()
    assert before == pytest.approx(expected["loss_with_base_weights_only"], rel=LOSS["rtol"])
    loaded = load_into(model, file)
    assert loaded == {name for name, _ in model.named_parameters() if projections(name) or norms(name) or lora(name)}
    after = loss_of(model, golden, expected).item()
    assert after == pytest.approx(expected["loss_after_loading"], rel=LOSS["rtol"])


def test_one_more_step(
    golden: Path, folder: Path, file: Path, model: TinyGPTVForConditionalGeneration, expected: dict
) -> None:
    load_into(model, file)
    train_only(model, projections, norms, lora)
    optimizer = restored_optimizer(model, load_torch(file)["optimizer"], expected)
    loss_of(model, golden, expected).backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    for key, reference in tensors(folder / "after_one_step_of_resume.safetensors").items():
        name = canonical_name(key.removeprefix("after_resume."))
        torch.testing.assert_close(
            parameters[name].detach(), reference, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    loss = loss_of(model, golden, expected).item()
    assert loss == pytest.approx(expected["loss_after_one_more_step"], rel=LOSS["rtol"])


def test_imported_and_exported_again(file: Path, expected: dict, tmp_path: Path) -> None:
    """Importing and exporting keeps every bit and key, as well as the other entries than "model"."""
    before = load_torch(file)
    call(export, str(file), "--to", "original", "--out", str(tmp_path / "direct.pth"))
    assert_equal(load_torch(tmp_path / "direct.pth"), before)
    assert list(load_torch(tmp_path / "direct.pth")["model"]) == [entry["name"] for entry in expected["model_keys"]]
    call(convert, str(file), "--out", str(tmp_path / "ours.safetensors"))
    call(export, str(tmp_path / "ours.safetensors"), "--to", "original", "--out", str(tmp_path / "again.pth"))
    assert_equal(load_torch(tmp_path / "again.pth")["model"], before["model"])


def test_inspected(file: Path, expected: dict) -> None:
    report = inspect(file)
    buffers = len(expected["model_keys"]) - len(report.matched)
    assert (report.incomplete, len(report.ignored)) == ("", buffers)
    assert f"epoch {expected['epoch']}" in report.also_contains


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert (type(ours), len(ours)) == (type(theirs), len(theirs))
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


def restored_optimizer(model: TinyGPTVForConditionalGeneration, saved: dict, expected: dict) -> torch.optim.Optimizer:
    """Return torch's AdamW over the original's groups in the original's order, with its state."""
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[canonical_name(name)] for name in group["param_names"]]}
        for group in expected["optimizer"]["param_groups"]
    ]
    optimizer = torch.optim.AdamW(groups, lr=expected["lr_after_resume"])
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group["lr"] = expected["lr_after_resume"]
    return optimizer
