"""Adapters in peft's own format: what is exported, peft loads, and what peft saves is read here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights import convert as convert_verb
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.detect import open_any
from tinygptv_ds.weights.export import export as export_verb
from tinygptv_ds.weights.inspect import inspect
from tinygptv_ds.weights.trained import save_trained

PROMPT = {
    "input_ids": torch.tensor([[1, 19, 19, 19, 2, 3]]),
    "attention_mask": torch.ones(1, 6, dtype=torch.long),
    "pixel_values": torch.arange(3 * 28 * 28, dtype=torch.uint8).reshape(1, 3, 28, 28),
}


def export(source: Path, out: Path, *options: str) -> Path:
    call(export_verb, source, "--out", out, *options)
    return out


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**PROMPT).logits


@pytest.fixture
def exact(base: Callable[..., ModelSection], run: Path) -> TinyGPTVForConditionalGeneration:
    """The run's own model."""
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(run))
    return build_model(section, TextSection(), frozen_dtype=torch.float32)


@pytest.fixture
def plain(run: Path, tmp_path: Path) -> TinyGPTVForConditionalGeneration:
    """The exported base: the run's model with LoRA left out."""
    folder = export(run, tmp_path / "plain", "--drop-lora", "--dtype", "fp32")
    return TinyGPTVForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    return export(run, tmp_path / "adapter", "--to", "peft")


def test_peft_loads_it(
    adapter: Path, plain: TinyGPTVForConditionalGeneration, exact: TinyGPTVForConditionalGeneration, tmp_path: Path
) -> None:
    """On a base whose projections and norms have other values; and peft would save the same tensors."""
    expected = logits(exact)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.startswith("llama_proj") or (name.startswith("language_model.") and "layernorm" in name):
                parameter.zero_()
    wrapped = PeftModel.from_pretrained(plain, adapter)
    assert torch.equal(logits(wrapped), expected)
    answer = exact.generate(**PROMPT, max_new_tokens=4, do_sample=False)
    assert torch.equal(wrapped.generate(**PROMPT, max_new_tokens=4, do_sample=False), answer)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_it_is_read_again(
    adapter: Path, base: Callable[..., ModelSection], exact: TinyGPTVForConditionalGeneration, tmp_path: Path
) -> None:
    expected = logits(exact)
    for path in (adapter, adapter / "adapter_model.safetensors"):
        section = base(lora_r=3, lora_alpha=6.0, init_from=str(path))
        assert torch.equal(logits(build_model(section, TextSection(), frozen_dtype=torch.float32)), expected)
    assert torch.equal(logits(load_model(adapter, torch.float32)[0]), expected)
    again = export(adapter, tmp_path / "again", "--to", "peft")
    assert (again / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert torch.equal(
        logits(load_model(export(adapter, tmp_path / "a", "--to", "adapter"), torch.float32)[0]), expected
    )


def test_what_peft_has_trained(
    plain: TinyGPTVForConditionalGeneration, base: Callable[..., ModelSection], tmp_path: Path
) -> None:
    """Trained and saved by peft alone, with the norms whole, biases included."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=r"language_model\..*\.(query_key_value|dense)",
        modules_to_save=[
            "llama_proj",
            "llama_proj2",
            *(f"{kind}_layernorm" for kind in ("input", "q", "k", "post", "final")),
        ],
    )
    wrapped = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(tmp_path / "theirs"))
    model = build_model(section, TextSection(), frozen_dtype=torch.float32)
    assert torch.equal(logits(model), expected)
    call(convert_verb, tmp_path / "theirs", "--out", tmp_path / "converted.safetensors")
    converted = load_file(tmp_path / "converted.safetensors")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in converted.items())
    assert sum(".lora_" in name for name in converted) == 8


def test_inspected(adapter: Path) -> None:
    report = inspect(adapter)
    assert (report.container, report.kind) == ("peft adapter", "trained weights of TinyGPT-V")
    assert report.layout == "peft's names of an adapter on the whole model"
    assert (report.lora_r, report.lora_targets) == (3, ["dense", "query_key_value"])
    assert report.stage == "4 (its provenance.json)"
    assert report.incomplete == ""


def test_another_alpha_is_refused(adapter: Path, base: Callable[..., ModelSection]) -> None:
    section = base(lora_r=3, lora_alpha=16.0, init_from=str(adapter))
    with pytest.raises(WeightsError, match=r"lora_alpha 6\.0, the model has 16\.0; set model\.lora_alpha=6\.0"):
        build_model(section, TextSection(), frozen_dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"dense": 8}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_what_this_model_does_not_compute_is_refused(adapter: Path, change: dict, named: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=f"plain LoRA of one rank and one alpha, not .*{named}"):
        open_any(adapter)


def test_lora_alone_is_not_enough(adapter: Path, base: Callable[..., ModelSection]) -> None:
    """As peft saves it when no other modules are named."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(adapter))
    with pytest.raises(WeightsError, match="holds no first projection"):
        build_model(section, TextSection(), frozen_dtype=torch.float32)


def test_what_has_no_place_in_it_is_refused(run: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    notes = json.loads((run / "model/provenance.json").read_text())
    qformer = {name: tensor for name, tensor in values.items() if name.startswith("qformer.")}
    save_trained(load_file(run / "model/trained.safetensors") | qformer, tiny_config(), tmp_path / "v0/model", notes)
    with pytest.raises(WeightsError, match=r"also trained qformer\..* export it with --to adapter"):
        export(tmp_path / "v0", tmp_path / "out", "--to", "peft")


def test_a_model_without_lora_is_refused(
    base: Callable[..., ModelSection], run: Path, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    notes = json.loads((run / "model/provenance.json").read_text())
    notes["recipe"]["model"]["lora_r"] = 0
    without = {name: tensor for name, tensor in trained.items() if "lora" not in name}
    save_trained(without, tiny_config(lora_r=0), tmp_path / "stage1/model", notes)
    with pytest.raises(WeightsError, match="has no LoRA for an adapter of peft"):
        export(tmp_path / "stage1", tmp_path / "out", "--to", "peft")


def test_the_base_alone_is_no_start(run: Path, base: Callable[..., ModelSection], tmp_path: Path) -> None:
    plain = export(run, tmp_path / "plain", "--drop-lora", "--dtype", "fp32")
    assert "its LoRA is left out" in (plain / "README.md").read_text()
    with pytest.raises(WeightsError, match="LoRA left out, from which a stage cannot start"):
        build_model(base(init_from=str(plain)), TextSection(), frozen_dtype=torch.float32)
