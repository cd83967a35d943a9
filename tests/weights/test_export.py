"""Every exported form is the run's model: the same answers, the same values, loadable by what it is written for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.verbs import call
from helpers.weight_layouts import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.generate.load import load_model
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.detect import open_any
from tinygptv_ds.weights.export import export as verb
from tinygptv_ds.weights.layouts.tinygptv import BUFFER, original_name
from tinygptv_ds.weights.merge_lora import merged_weight
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.trained import save_trained

PROMPT = {
    "input_ids": torch.tensor([[1, 19, 19, 19, 2, 3]]),
    "attention_mask": torch.ones(1, 6, dtype=torch.long),
    "pixel_values": torch.arange(3 * 28 * 28, dtype=torch.uint8).reshape(1, 3, 28, 28),
}


@pytest.fixture
def model(base: Callable[..., ModelSection], run: Path) -> TinyGPTVForConditionalGeneration:
    """The run's model, LoRA apart, in fp32."""
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(run))
    return build_model(section, TextSection(), frozen_dtype=torch.float32)


def export(source: Path, out: Path, *options: str) -> Path:
    """The verb, whose errors come as exceptions here."""
    call(verb, source, "--out", out, *options)
    return out


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**PROMPT).logits


def loaded(folder: Path) -> TinyGPTVForConditionalGeneration:
    return TinyGPTVForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("merge", [True, False])
def test_hf_gives_the_same_answers(
    run: Path, model: TinyGPTVForConditionalGeneration, tmp_path: Path, merge: bool
) -> None:
    """Unmerged bit for bit, merged to rounding (1e-4 of logits in fp32); the base weights are not needed any more."""
    out = export(run, tmp_path / "out", "--dtype", "fp32", *([] if merge else ["--keep-lora"]))
    shutil.rmtree(tmp_path / "base")
    exported = loaded(out)
    assert not exported.training
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if merge else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(exported), logits(model), **tolerance)
    assert any("lora" in name for name in exported.state_dict()) is not merge
    assert exported.config.lora_r == (0 if merge else 3)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert exported.generate(**PROMPT, **kwargs).tolist() == model.generate(**PROMPT, **kwargs).tolist()


def test_hf_is_complete(run: Path, tmp_path: Path) -> None:
    out = export(run / "model", tmp_path / "out")
    exported = loaded(out)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert not any(buffer.any() for name, buffer in exported.named_buffers() if name.endswith("k_bias"))
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 9
    generation = exported.generation_config
    assert generation.eos_token_id == TinyGPTVProcessor.from_pretrained(out).stop_ids()
    assert (generation.do_sample, generation.pad_token_id) == (False, 9)


def test_hf_notes_its_origin_and_no_local_path(run: Path, tmp_path: Path) -> None:
    (tmp_path / "vqa.json").write_text(json.dumps({"accuracy": 0.875, "questions": 40, "predictions": []}))
    out = export(run, tmp_path / "out", "--scores", str(tmp_path / "vqa.json"))
    notes, card = json.loads((out / "provenance.json").read_text()), (out / "README.md").read_text()
    assert (notes["stage"], notes["lora"]) == (4, "merged")
    eva = notes["base"]["eva_vit"]["files"]["eva_vit_g.pth"]
    assert len(eva) == 64
    for text in (eva, "x (1)", "| vqa | accuracy | 0.875 |", "rank 3, alpha 6", "`[INST] {} [/INST]`"):
        assert text in card, text
    texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md", ".yaml")]
    assert not any(str(tmp_path) in text for text in texts)


def test_auto_classes(run: Path, model: TinyGPTVForConditionalGeneration, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", "--dtype", "fp32", "--keep-lora")
    exported = AutoModelForImageTextToText.from_pretrained(out)
    assert isinstance(exported, TinyGPTVForConditionalGeneration)
    assert torch.equal(logits(exported), logits(model))
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, TinyGPTVProcessor)
    assert (processor.image_size, processor.image_token_id, processor.num_query_tokens) == (28, 19, 3)
    assert (processor.prompt_template, processor.end_sym) == ("[INST] {} [/INST]", "###")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_dtype(run: Path, tmp_path: Path, dtype: str) -> None:
    exported = loaded(export(run, tmp_path / "out", "--dtype", dtype, "--keep-lora"))
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {p.dtype for p in exported.parameters()} == {wanted}


def test_lora_is_not_rounded_before_it_is_merged(run: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    exported = loaded(export(run, tmp_path / "out")).state_dict()
    name = "language_model.model.layers.0.self_attn.query_key_value"
    a, b = values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"]
    expected = values[f"{name}.weight"] + 6 / 3 * b @ a
    torch.testing.assert_close(exported[f"{name}.weight"], expected.bfloat16(), rtol=0, atol=0)


def test_a_value_beyond_fp16_is_refused(
    base: Callable[..., ModelSection], run: Path, values: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "blocks.0.mlp.fc2.bias"
    base(eva=lambda state: state | {name: values[f"visual_encoder.{name}"] + 1e5})
    with pytest.raises(
        WeightsError, match=r"fc2\.bias holds values up to 1e\+05, above fp16's 65504; take bf16 or fp32"
    ):
        export(run, tmp_path / "out", "--dtype", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    export(run, tmp_path / "out", "--dtype", "bf16")


def test_an_adapter_goes_on_its_base(run: Path, model: TinyGPTVForConditionalGeneration, tmp_path: Path) -> None:
    """Nothing but what was trained, and the model again from it, to infer and to go on training."""
    out = export(run, tmp_path / "out", "--to", "trained")
    stored = open_any(out).stored
    assert stored.keys() == open_any(run).stored.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    again, processor = load_model(out, torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert processor.prompt_template == "[INST] {} [/INST]"
    half = export(out, tmp_path / "half", "--to", "trained", "--dtype", "bf16")
    assert {tensor.dtype for tensor in open_any(half).stored.values()} == {torch.bfloat16}


def test_an_adapter_finds_its_base_elsewhere(
    run: Path, model: TinyGPTVForConditionalGeneration, tmp_path: Path
) -> None:
    out = export(run, tmp_path / "out", "--to", "trained")
    (tmp_path / "base/phi").rename(tmp_path / "moved")
    with pytest.raises(WeightsError, match=r"are missing: phi \(.*base/phi\); .* --set model\.phi=PATH"):
        load_model(out, torch.float32)
    again, _ = load_model(out, torch.float32, overrides=[f"model.phi={tmp_path / 'moved'}"])
    assert torch.equal(logits(again), logits(model))


def test_original_and_back(run: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    """The names of the original's own file, under "model", and every bit again from it."""
    out = export(run, tmp_path / "checkpoint_0.pth", "--to", "original")
    state = torch.load(out, weights_only=True)["model"]
    assert state.keys() == {original_name(name, lora=True) for name in trained} | {BUFFER}
    assert torch.equal(state[BUFFER], torch.arange(512)[None])
    assert all(torch.equal(state[original_name(name, lora=True)], tensor) for name, tensor in trained.items())
    shutil.rmtree(tmp_path / "base")  # no base weights are needed
    again = export(out, tmp_path / "again.pth", "--to", "original")
    assert_same(torch.load(again, weights_only=True), torch.load(out, weights_only=True))


def assert_same(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_same(ours[name], value)
        elif isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value


def test_without_lora_the_original_has_no_wrapper(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    without = {name: tensor for name, tensor in trained.items() if "lora" not in name}
    save_trained(without, tiny_config(lora_r=0), tmp_path / "stage1/model", {"stage": 1})
    state = torch.load(export(tmp_path / "stage1", tmp_path / "x.pth", "--to", "original"), weights_only=True)["model"]
    assert "llama_model.model.final_layernorm.weight" in state


def test_half_of_a_model_is_no_original(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    trained.pop("llama_proj2.bias")
    save_trained(trained, tiny_config(), tmp_path / "run/model", {"stage": 3})
    with pytest.raises(WeightsError, match=r"missing: llama_proj2\.bias"):
        export(tmp_path / "run", tmp_path / "x.pth", "--to", "original")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_the_language_model_alone(
    base: Callable[..., ModelSection],
    run: Path,
    model: TinyGPTVForConditionalGeneration,
    tmp_path: Path,
    layout: str,
) -> None:
    """Named as model.phi, with the projections next to, it is the whole model again, LoRA in its weights."""
    out = export(run, tmp_path / "out", "--to", "phi", "--layout", layout, "--dtype", "fp32")
    names = load_file(out / "model.safetensors").keys()
    assert any("query_key_value" in name for name in names) is (layout == "fused")
    assert any("q_proj" in name for name in names) is (layout == "split")
    projections = {n: t for n, t in open_any(run).stored.items() if "lora" not in n}
    torch.save({"model": {name: stored.read() for name, stored in projections.items()}}, tmp_path / "rest.pth")
    section = base(phi_folder=out, init_from=str(tmp_path / "rest.pth"))
    again = build_model(section, TextSection(), frozen_dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_transformers_own_phi_takes_the_split_layout(run: Path, tmp_path: Path) -> None:
    """All but the norm that it lacks; the README explains what that means."""
    out = export(run, tmp_path / "out", "--to", "phi", "--dtype", "fp32")
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(name.endswith("post_layernorm.weight") for name in report["unexpected_keys"])
    assert "gives nonsense" in (out / "README.md").read_text()


def test_a_run_without_exporting(run: Path, model: TinyGPTVForConditionalGeneration) -> None:
    again, processor = load_model(run, torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert processor.tokenizer.eos_token_id == 9
    assert {p.dtype for p in resolve(run).model(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    for to in ("hf", "trained", "adapter", "original", "phi"):
        with pytest.raises(WeightsError, match="already exists"):
            export(run, tmp_path / "base", "--to", to)
    assert (tmp_path / "base/phi").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "phi", "--keep-lora"], "--keep-lora is for --to hf"),
        (["--layout", "fused"], "--layout fused is for --to phi"),
        (["--to", "adapter", "--scores", "x.json"], "--scores is for --to hf"),
        (["--scores", "nowhere.json"], "no such file: nowhere.json"),
    ],
)
def test_an_option_without_effect_is_refused(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "out", *options)


@pytest.mark.parametrize("part", ["phi", "eva_vit_g.pth", "blip2.pth"])
def test_base_weights_that_are_gone_are_named(run: Path, tmp_path: Path, part: str) -> None:
    gone = tmp_path / "base" / part
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=f"are missing: .*{gone.name}"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_weights_that_have_changed_are_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "base/blip2.pth"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(WeightsError, match=r"blip2\.pth has changed since .* was trained on it"):
        export(run, tmp_path / "out")


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tinygptv_ds.weights.export.hf.model_card", fail)
    with pytest.raises(OSError, match="no space"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_merged_weights_are_no_start(base: Callable[..., ModelSection], run: Path, tmp_path: Path) -> None:
    """They would go onto the unmerged base, and LoRA would be lost; with LoRA kept they are what they were."""
    merged = export(run, tmp_path / "merged", "--dtype", "fp32")
    kept = export(run, tmp_path / "kept", "--dtype", "fp32", "--keep-lora")
    with pytest.raises(WeightsError, match="LoRA merged into its base, from which a stage cannot start"):
        build_model(base(lora_r=3, lora_alpha=6.0, init_from=str(merged)), TextSection(), frozen_dtype=torch.float32)
    section = base(lora_r=3, lora_alpha=6.0, init_from=str(kept))
    again = build_model(section, TextSection(), frozen_dtype=torch.float32)
    first = build_model(base(lora_r=3, lora_alpha=6.0, init_from=str(run)), TextSection(), frozen_dtype=torch.float32)
    assert torch.equal(logits(again), logits(first))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.floats(0.5, 32), st.integers(0, 2**16))
def test_merging_any_sizes(width_in: int, width_out: int, rank: int, alpha: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LoRALinear(width_in, width_out, lora_r=rank, lora_alpha=alpha, lora_dropout=0.5).double().eval()
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, width_in).double()
    weight = merged_weight(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    merged = nn.functional.linear(x, weight.double(), layer.bias)
    torch.testing.assert_close(merged, layer(x), rtol=1e-4, atol=1e-4 * alpha)
