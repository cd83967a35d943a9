"""Adapters in peft's own format: what is exported, peft loads, and what peft saves is read here."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PhiForCausalLM

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments, load_from
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights import convert as convert_verb
from tinygptv_ds.weights.assemble import build_model
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
    return export(run, tmp_path / "adapter", "--to", "adapter")


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
    again = export(adapter, tmp_path / "again", "--to", "adapter")
    assert (again / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert torch.equal(
        logits(load_model(export(adapter, tmp_path / "a", "--to", "trained"), torch.float32)[0]), expected
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


VARIANTS: dict[str, dict] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"dense": 2}, "alpha_pattern": {"query_key_value": 11}},
}


def trained_by_peft(
    model: nn.Module, out: Path, modules: list[str] | None = None, targets: object = None, **options: object
) -> Tensor:
    """Put an adapter on a model, give it random values, save it, and return the model's logits with it."""
    targets = ["query_key_value", "dense"] if targets is None else targets
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=modules, **options)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
                if "magnitude" in name:
                    parameter.abs_()
    expected = logits(wrapped)
    wrapped.save_pretrained(out)
    return expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_answers_as_in_peft(run: Path, tmp_path: Path, variant: str) -> None:
    """On the model as it is exported by default, with the layers that peft finds: also those of the Q-Former."""
    model = export(run, tmp_path / "model", "--dtype", "fp32")
    theirs = tmp_path / "theirs"
    modules = ["llama_proj2"] if variant == "dora" else None
    expected = trained_by_peft(
        TinyGPTVForConditionalGeneration.from_pretrained(model), theirs, modules, **VARIANTS[variant]
    )
    assert torch.allclose(logits(load_model(model, torch.float32, adapter=theirs)[0]), expected, atol=2e-4, rtol=1e-4)
    assert torch.allclose(logits(load_model(theirs, torch.float32)[0]), expected, atol=2e-4, rtol=1e-4)
    report = inspect(theirs)
    assert report.kind == "LoRA in peft's format, for the model that it belongs to"
    assert report.adapter is not None and report.adapter.endswith(f"on {model}")
    assert report.adapter.startswith("DoRA" if "dora" in variant else "LoRA")
    assert report.incomplete == ""


def test_chat_takes_an_adapter(run: Path, tmp_path: Path) -> None:
    model = export(run, tmp_path / "model", "--dtype", "fp32")
    theirs = tmp_path / "theirs"
    expected = trained_by_peft(TinyGPTVForConditionalGeneration.from_pretrained(model), theirs)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args([str(model), "--adapter", str(theirs), "--dtype", "fp32", "--device", "cpu"])
    check_model_arguments(args)
    assert torch.allclose(logits(load_from(args).model), expected, atol=2e-4, rtol=1e-4)
    args.adapter = tmp_path / "none"
    with pytest.raises(WeightsError, match="none: no such file or folder"):
        check_model_arguments(args)
    with pytest.raises(WeightsError, match=r"no folder of peft's with adapter_config\.json"):
        load_model(model, torch.float32, adapter=run)


def test_lora_alone_starts_from_its_base(run: Path, base: Callable[..., ModelSection], tmp_path: Path) -> None:
    """Projections and norms are those of the exported model that peft has trained it on."""
    for form, options in (("plain", ["--drop-lora"]), ("merged", [])):
        folder = export(run, tmp_path / form, *options, "--dtype", "fp32")
        theirs = tmp_path / f"on_{form}"
        targets = r"language_model\..*\.(query_key_value|dense)"
        model = TinyGPTVForConditionalGeneration.from_pretrained(folder)
        expected = trained_by_peft(model, theirs, targets=targets, use_rslora=True)
        section = base(lora_r=3, lora_alpha=6 * 3**0.5, init_from=str(theirs))
        if form == "merged":  # the Phi of such a run is that of the exported model
            with pytest.raises(WeightsError, match="holds no first projection"):
                build_model(section, TextSection(), frozen_dtype=torch.float32)
            section = dataclasses.replace(section, phi=str(folder))
        found = build_model(section, TextSection(), frozen_dtype=torch.float32)
        assert torch.allclose(logits(found), expected, atol=2e-4, rtol=1e-4)


def test_another_alpha_of_rslora_is_named(run: Path, base: Callable[..., ModelSection], tmp_path: Path) -> None:
    plain = export(run, tmp_path / "plain", "--drop-lora", "--dtype", "fp32")
    targets = r"language_model\..*\.(query_key_value|dense)"
    model = TinyGPTVForConditionalGeneration.from_pretrained(plain)
    trained_by_peft(model, tmp_path / "theirs", targets=targets, use_rslora=True)
    with pytest.raises(WeightsError, match=r"set model\.lora_alpha=10\.39"):
        build_model(
            base(lora_r=3, lora_alpha=6.0, init_from=str(tmp_path / "theirs")),
            TextSection(),
            frozen_dtype=torch.float32,
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "not DoRA"),
        ({"alpha_pattern": {"dense": 11}}, "not LoRA of several ranks or scales"),
        ({"targets": ["dense"]}, r"not LoRA on qformer\..*chat MODEL --adapter DIR"),
    ],
)
def test_what_this_model_does_not_compute_is_refused(
    run: Path, base: Callable[..., ModelSection], tmp_path: Path, options: dict, named: str
) -> None:
    model = TinyGPTVForConditionalGeneration.from_pretrained(export(run, tmp_path / "m", "--drop-lora"))
    targets = r"language_model\..*\.(query_key_value|dense)"
    trained_by_peft(model.float(), tmp_path / "theirs", **{"targets": targets, **options})
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(tmp_path / "theirs"))
    with pytest.raises(WeightsError, match=named):
        build_model(section, TextSection(), frozen_dtype=torch.float32)
    with pytest.raises(WeightsError, match=named):
        call(convert_verb, tmp_path / "theirs", "--out", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "not peft_type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa"),
        ({"r": 8}, "the two files do not belong together"),
        ({"use_dora": True}, "use_dora is True, but"),
        ({"rank_pattern": {"(a+)+$": 4}}, "is no plain name of a layer"),
    ],
)
def test_other_methods_are_refused(adapter: Path, change: dict, named: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    assert named in inspect(adapter).incomplete


def test_an_adapter_of_another_model(tmp_path: Path, base: Callable[..., ModelSection]) -> None:
    """Of a Phi with separate q, k and v, as transformers has it."""
    section = base()
    phi = PhiForCausalLM.from_pretrained(section.phi)
    theirs = tmp_path / "theirs"
    get_peft_model(phi, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(theirs)
    message = "an adapter of peft, not whole weights: LoRA on q_proj, v_proj of .*merge_and_unload"
    assert re.search(message, inspect(theirs).incomplete)
    with pytest.raises(WeightsError, match=message):
        call(convert_verb, theirs, "--out", tmp_path / "out.safetensors")
    with pytest.raises(WeightsError, match=message):
        build_model(base(lora_r=2, init_from=str(theirs)), TextSection(), frozen_dtype=torch.float32)
    with pytest.raises(WeightsError, match="an adapter of peft, not whole weights"):
        build_model(base(phi_folder=theirs), TextSection(), frozen_dtype=torch.float32)


def test_merged_twice_is_refused(run: Path, adapter: Path, tmp_path: Path) -> None:
    model = export(run, tmp_path / "model", "--dtype", "fp32")
    with pytest.raises(WeightsError, match=r"already has the LoRA of .* count twice"):
        load_model(model, torch.float32, adapter=adapter)
    plain = export(run, tmp_path / "plain", "--drop-lora", "--dtype", "fp32")
    expected = logits(load_model(run, torch.float32)[0])
    found = logits(load_model(plain, torch.float32, adapter=adapter)[0])
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


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
    with pytest.raises(WeightsError, match=r"also trained qformer\..* export it with --to trained"):
        export(tmp_path / "v0", tmp_path / "out", "--to", "adapter")


def test_a_model_without_lora_is_refused(
    base: Callable[..., ModelSection], run: Path, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    notes = json.loads((run / "model/provenance.json").read_text())
    notes["recipe"]["model"]["lora_r"] = 0
    without = {name: tensor for name, tensor in trained.items() if "lora" not in name}
    save_trained(without, tiny_config(lora_r=0), tmp_path / "stage1/model", notes)
    with pytest.raises(WeightsError, match="has no LoRA, which an adapter of peft needs"):
        export(tmp_path / "stage1", tmp_path / "out", "--to", "adapter")


def test_the_base_alone_is_no_start(run: Path, base: Callable[..., ModelSection], tmp_path: Path) -> None:
    plain = export(run, tmp_path / "plain", "--drop-lora", "--dtype", "fp32")
    assert "its LoRA is left out" in (plain / "README.md").read_text()
    with pytest.raises(WeightsError, match="LoRA left out, from which a stage cannot start"):
        build_model(base(init_from=str(plain)), TextSection(), frozen_dtype=torch.float32)
