"""An exported folder stands on its own and answers as the run's model does, LoRA merged or kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoTokenizer
from weight_layouts import tiny_config

from tinygptv_ds.cli import main
from tinygptv_ds.config.schema import (
    DataSection,
    DatasetSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    TextSection,
    TrainSection,
)
from tinygptv_ds.convert.assemble import build_model
from tinygptv_ds.convert.export import export_hf, load_run
from tinygptv_ds.convert.merge import merged_weight
from tinygptv_ds.convert.trained import provenance_of, save_trained
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

PROMPT = {
    "input_ids": torch.tensor([[1, 19, 19, 19, 2, 3]]),
    "attention_mask": torch.ones(1, 6, dtype=torch.long),
    "pixel_values": torch.arange(3 * 28 * 28, dtype=torch.uint8).reshape(1, 3, 28, 28),
}


@pytest.fixture
def run(base: Callable[..., ModelSection], trained: dict[str, Tensor], tmp_path: Path) -> Path:
    section = base(lora_r=3, lora_alpha=6.0)
    recipe = Recipe(
        stage=4,
        model=section,
        data=DataSection([DatasetSection("x", "x")]),
        optimizer=OptimizerSection(lr=1.0, min_lr=1.0),
        train=TrainSection(batch_size=1, micro_batch_size=1),
    )
    save_trained(trained, tiny_config(), tmp_path / "run/model", provenance_of(recipe))
    return tmp_path / "run"


@pytest.fixture
def model(base: Callable[..., ModelSection], run: Path) -> TinyGPTVForConditionalGeneration:
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(run))
    return build_model(section, TextSection(), frozen_dtype=torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**PROMPT).logits


@pytest.mark.parametrize("merge", [True, False])
def test_the_same_answers(run: Path, model: TinyGPTVForConditionalGeneration, tmp_path: Path, merge: bool) -> None:
    """Unmerged bit for bit, merged to rounding; also where the base weights have gone since."""
    export_hf(run, tmp_path / "out", dtype=torch.float32, merge_lora=merge)
    shutil.rmtree(tmp_path / "base")
    exported = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not exported.training
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if merge else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(exported), logits(model), **tolerance)
    assert any("lora" in name for name in exported.state_dict()) is not merge
    assert exported.config.lora_r == (0 if merge else 3)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert exported.generate(**PROMPT, **kwargs).tolist() == model.generate(**PROMPT, **kwargs).tolist()


def test_dtype_and_contents(run: Path, tmp_path: Path) -> None:
    export_hf(run / "model", tmp_path / "out", dtype=torch.bfloat16)
    exported = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 9
    assert json.loads((tmp_path / "out/provenance.json").read_text())["stage"] == 4
    assert not any(buffer.any() for name, buffer in exported.named_buffers() if name.endswith("k_bias"))


def test_the_verb(run: Path, tmp_path: Path) -> None:
    main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "fp16", "--keep-lora"])
    exported = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in exported.parameters()} == {torch.float16}
    assert exported.config.lora_r == 3


def test_lora_is_not_rounded_before_it_is_merged(run: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    export_hf(run, tmp_path / "out", dtype=torch.bfloat16)
    exported = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    name = "language_model.model.layers.0.self_attn.query_key_value"
    a, b = values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"]
    expected = values[f"{name}.weight"].bfloat16().float() + 6 / 3 * b @ a
    assert torch.equal(exported[f"{name}.weight"], expected.bfloat16())


def test_a_run_without_exporting(run: Path, model: TinyGPTVForConditionalGeneration) -> None:
    loaded, tokenizer = load_run(run, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.eos_token_id == 9
    assert {p.dtype for p in load_run(run, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="already there"):
        export_hf(run, tmp_path / "base", dtype=torch.float32)
    assert (tmp_path / "base/phi").is_dir()


@pytest.mark.parametrize("part", ["phi", "eva_vit_g.pth", "blip2.pth"])
def test_base_weights_that_are_gone_are_named(run: Path, tmp_path: Path, part: str) -> None:
    gone = tmp_path / "base" / part
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=f"are gone: .*{gone.name}"):
        export_hf(run, tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tinygptv_ds.convert.assemble.load_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        export_hf(run, tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_provenance_without_paths(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    save_trained(trained, tiny_config(), tmp_path / "run/model", {"stage": 1})
    with pytest.raises(WeightsError, match="does not say where phi, eva_vit, qformer lies"):
        export_hf(tmp_path / "run", tmp_path / "out", dtype=torch.float32)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.floats(0.5, 32), st.integers(0, 2**16))
def test_merging_any_sizes(width_in: int, width_out: int, rank: int, alpha: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LoRALinear(width_in, width_out, lora_r=rank, lora_alpha=alpha, lora_dropout=0.5).double().eval()
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, width_in).double()
    weight = merged_weight(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    merged = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(merged, layer(x), rtol=1e-4, atol=1e-4 * alpha)
