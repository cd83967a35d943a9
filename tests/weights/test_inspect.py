"""`inspect` reports what a file is from its content alone, and names every problem."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import blip2_state, eva_state, phi_state, save_phi
from torch import Tensor

from tinygptv_ds.config.recipe import ModelSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.files import sha256
from tinygptv_ds.weights import inspect as verb
from tinygptv_ds.weights.inspect import WeightsReport, inspect
from tinygptv_ds.weights.layouts.tinygptv import BUFFER, original_name
from tinygptv_ds.weights.released import RELEASED


def original(trained: dict[str, Tensor], *, lora: bool = True) -> dict[str, Tensor]:
    return {original_name(name, lora=lora): tensor for name, tensor in trained.items()} | {
        BUFFER: torch.arange(512)[None]
    }


def assert_whole(report: WeightsReport, matched: int) -> None:
    assert (len(report.matched), report.missing, report.unexpected, report.wrong_shape) == (matched, [], [], [])
    assert report.incomplete == ""


@pytest.mark.parametrize("layout", ["split", "fused", "remote"])
def test_phi(tmp_path: Path, values: dict[str, Tensor], layout: str) -> None:
    state = phi_state(values, layout)
    folder = save_phi(tmp_path / "phi", state, "many safetensors")
    report = inspect(folder)
    assert (report.kind, report.container, report.layout) == ("Phi", "folder of weights", layout)
    assert_whole(report, len(phi_state(values, "fused")))
    assert report.files == {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    assert report.parts["Phi"].dtypes == ["float32"]
    assert sum(part.values for part in report.parts.values()) == sum(tensor.numel() for tensor in state.values())


def test_eva_vit(tmp_path: Path, values: dict[str, Tensor]) -> None:
    torch.save({n: t.half() for n, t in eva_state(values).items()}, tmp_path / "eva_vit_g.pth")
    report = inspect(tmp_path / "eva_vit_g.pth")
    assert (report.kind, report.parts["EVA ViT"].dtypes) == ("EVA ViT", ["float16"])
    assert report.ignored == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert_whole(report, len(eva_state(values)) - 4)


def test_blip2(tmp_path: Path, values: dict[str, Tensor]) -> None:
    torch.save({"model": blip2_state(values)}, tmp_path / "blip2.pth")
    report = inspect(tmp_path / "blip2.pth")
    assert (report.kind, report.qformer, len(report.ignored)) == ("Q-Former of BLIP-2", True, 8)
    assert_whole(report, sum(n.startswith(("qformer.", "ln_vision.", "query_tokens")) for n in values))


def test_a_file_of_the_original(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    content = {"model": original(trained), "optimizer": {"state": {}}, "epoch": 3, "config": {}}
    torch.save(content, tmp_path / "checkpoint_3.pth")
    report = inspect(tmp_path / "checkpoint_3.pth")
    assert report.kind == "trained weights of TinyGPT-V"
    assert report.stage == "2 or 3 or 4 (LoRA; these three train the same parts)"
    assert (report.lora_r, report.lora_targets) == (3, ["dense", "query_key_value"])
    assert (report.qformer, report.released, report.ignored) == (False, None, [BUFFER])
    assert report.also_contains == ["optimizer", "epoch 3", "config"]
    assert set(report.parts) == {"llama_proj", "llama_proj2", "norms of Phi", "LoRA"}
    assert_whole(report, len(trained))


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({"model": {"arch": "minigpt_v2"}}, 4),
        ({"model": {"arch": "minigpt4"}, "datasets": {"cc_sbu_align": {}}}, 3),
        ({"model": {"arch": "minigpt4"}, "datasets": {"laion": {}, "cc_sbu": {}}}, 2),
    ],
)
def test_the_stage_from_the_configuration_inside(tmp_path: Path, trained: dict, config: dict, stage: int) -> None:
    torch.save({"model": original(trained), "config": config}, tmp_path / "x.pth")
    assert inspect(tmp_path / "x.pth").stage == f"{stage} (the configuration in the file)"


def test_stage_1_and_v0(tmp_path: Path, trained: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    without = {name: tensor for name, tensor in trained.items() if "lora" not in name}
    torch.save({"model": original(without, lora=False)}, tmp_path / "one.pth")
    report = inspect(tmp_path / "one.pth")
    assert (report.stage, report.lora_r, report.layout) == ("1 (no LoRA)", 0, "the original's names, without LoRA")
    qformer = {n: t for n, t in values.items() if n.startswith(("qformer.", "query_tokens"))}
    torch.save({"model": original(trained | qformer)}, tmp_path / "v0.pth")
    report = inspect(tmp_path / "v0.pth")
    assert (report.stage, report.qformer) == ("4 (a trained Q-Former, as in the first release)", True)
    assert_whole(report, len(trained | qformer))


@pytest.mark.parametrize(
    ("respell", "layout"),
    [
        (lambda n: n, "LoRA as peft 0.2 spells it"),
        (lambda n: n.replace("_A.", "_A.default.").replace("_B.", "_B.default."), "LoRA as peft spells it from 0.3 on"),
        (lambda n: n.replace("base_model.model.", ""), "LoRA as peft 0.2 spells it, without its wrapper"),
    ],
)
def test_spellings(tmp_path: Path, trained: dict[str, Tensor], respell: Callable, layout: str) -> None:
    torch.save({"model": {respell(name): t for name, t in original(trained).items()}}, tmp_path / "x.pth")
    report = inspect(tmp_path / "x.pth")
    assert report.layout == f"the original's names, {layout}"
    assert_whole(report, len(trained))


def test_runs(run: Path, trained: dict[str, Tensor]) -> None:
    for path, container in (("", "run directory"), ("model", "model/ folder of a run")):
        report = inspect(run / path)
        assert (report.container, report.stage) == (container, "4 (its provenance.json)")
        assert_whole(report, len(trained))


def test_minigpt4(tmp_path: Path) -> None:
    state = {"llama_proj.weight": torch.zeros(5, 6), "llama_proj.bias": torch.zeros(5)}
    torch.save({"model": state}, tmp_path / "vicuna.pth")
    report = inspect(tmp_path / "vicuna.pth")
    assert report.kind == "first projection, as of MiniGPT-4"
    assert_whole(report, 2)


def test_a_released_file_is_known_by_its_hash(tmp_path: Path, trained: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": original(trained)}, tmp_path / "renamed.pth")
    monkeypatch.setattr("tinygptv_ds.weights.provenance.hashes", lambda files: {files[0].name: RELEASED[2].sha256})
    assert inspect(tmp_path / "renamed.pth").released == "TinyGPT-V_for_Stage3.pth (with LoRA)"


NORM = "llama_model.base_model.model.model.layers.1.post_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "field", "problem"),
    [
        (lambda s: s.pop(NORM), "missing", "language_model.model.layers.1.post_layernorm.weight"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected", "surprise"),
        (lambda s: s.update({NORM: torch.zeros(7)}), "wrong_shape", "post_layernorm.weight is [7] instead of [12]"),
    ],
)
def test_what_is_not_right_is_named(tmp_path: Path, trained: dict, spoil: Callable, field: str, problem: str) -> None:
    state = original(trained)
    spoil(state)
    torch.save({"model": state}, tmp_path / "x.pth")
    report = inspect(tmp_path / "x.pth")
    assert len(getattr(report, field)) == 1
    assert problem in getattr(report, field)[0]
    assert problem in report.incomplete


def test_the_verb_reports_before_it_complains(
    tmp_path: Path, trained: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": original(trained)}, tmp_path / "x.pth")
    call(verb, tmp_path / "x.pth", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["matched"] == inspect(tmp_path / "x.pth").matched
    trained.pop("llama_proj.bias")
    torch.save({"model": original(trained)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"is not complete, .*: missing: llama_proj\.bias"):
        call(verb, tmp_path / "x.pth")
    assert "missing       1: llama_proj.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"some.weight": torch.zeros(1)}, "holds some.weight: neither Phi, nor EVA ViT"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(1)}, None),
        ({"llama_model.model.layers.0.self_attn.q_layernorm.weight": torch.zeros(1)}, None),
    ],
)
def test_unknown_and_fragments(tmp_path: Path, state: dict, message: str | None) -> None:
    torch.save(state, tmp_path / "x.pth")
    if message is None:
        assert "is missing; the file holds a part alone" in inspect(tmp_path / "x.pth").incomplete
    else:
        with pytest.raises(WeightsError, match=message):
            inspect(tmp_path / "x.pth")


def test_a_broken_upload_is_known_by_its_size(tmp_path: Path) -> None:
    (broken,) = (file for file in RELEASED if not file.usable)
    with (tmp_path / "TinyGPT-V_for_Stage4.pth").open("wb") as file:
        file.truncate(broken.size)
    with pytest.raises(WeightsError, match="a broken upload of 2024-01-19: download the file again"):
        inspect(tmp_path / "TinyGPT-V_for_Stage4.pth")


def test_a_base_model_as_trained_weights(base: Callable[..., ModelSection], run: Path) -> None:
    from tinygptv_ds.weights.detect import open_any
    from tinygptv_ds.weights.trained import trained_source

    section = base()
    for place in ("phi", "eva_vit", "qformer"):
        with pytest.raises(WeightsError, match=rf"is a base model .* its place is model\.{place}"):
            trained_source(open_any(Path(getattr(section, place))))
