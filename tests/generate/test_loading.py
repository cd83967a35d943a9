"""From a run, an adapter or an exported folder, whole or quantized: the same model, and nothing of it twice."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.errors import ConfigError, WeightsError
from tinygptv_ds.generate import load as loading
from tinygptv_ds.generate.load import LoadedModel, load_model
from tinygptv_ds.generate.quantize import AdaptedLinear, quantized_linear
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.weights.assemble import build_model
from tinygptv_ds.weights.export.hf import export_hf
from tinygptv_ds.weights.export.trained import export_trained
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.resolve import resolve
from tinygptv_ds.weights.trained import save_trained

FP32 = torch.float32
needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is an extra")


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run 64 wide, as much as a block of 4-bit weights."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 64)
        weights = tiny.save_weights(folder / "weights")
    recipe = build_recipe(tiny.recipe(weights, {"vqa": Path("vqa")}), "the tests' recipe")
    torch.manual_seed(1)
    model = build_model(recipe.model, recipe.text, frozen_dtype=FP32)
    state = {
        name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters() if is_trainable(name)
    }
    (folder / "run").mkdir()
    save_trained(state, model.config, folder / "run/model", provenance_of(recipe))
    return folder / "run"


def logits(model: TinyGPTVForConditionalGeneration) -> Tensor:
    """`[1, L, vocabulary]` of a row with an image."""
    ids = torch.tensor([[7, *[model.config.image_token_id] * tiny.QUERIES, 70, 80, 90]])
    pixels = (torch.arange(3 * 28 * 28) * 7 % 256).to(torch.uint8).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return model(ids, pixel_values=pixels).logits


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def test_every_form_is_the_same_model(trained_run: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """Bit for bit where LoRA is stored separately, to rounding where it is merged, in memory or in the files."""
    as_resolved = logits(resolve(trained_run).model(FP32))
    export_trained(resolve(trained_run), tmp_path / "trained", dtype=None)
    export_hf(resolve(trained_run), tmp_path / "kept", dtype=FP32, lora="kept")
    for path in (trained_run, trained_run / "model", tmp_path / "trained", tmp_path / "kept"):
        model, processor = load_model(path, FP32)
        assert torch.equal(logits(model), as_resolved), path
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert (processor.prompt_template, processor.end_sym) == ("[INST] {} [/INST]", "###")
    merged, _ = load_model(tmp_path / "kept", FP32, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.equal(logits(merged), logits(loaded[0]))  # as export has merged it
    torch.testing.assert_close(logits(merged), as_resolved, rtol=1e-4, atol=1e-4)


def test_dtypes(exported: Path) -> None:
    model, _ = load_model(exported)
    assert {p.dtype for p in model.parameters()} == {loading.default_dtype(torch.device("cpu"))}
    assert {p.dtype for p in load_model(exported, torch.float16)[0].parameters()} == {torch.float16}
    assert model.generation_config.max_new_tokens == 300


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
def test_quantized(wide_run: Path, bits: int, merge: bool) -> None:
    """Near the whole model (of random weights, where errors are largest), LoRA not lost, with the ViT too."""
    true = logits(load_model(wide_run, FP32)[0])
    model, _ = load_model(wide_run, FP32, bits=bits, merge=merge)
    linear = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "weight")}
    kind = "Linear8bitLt" if bits == 8 else "Linear4bit"
    layers = [name for name, made in linear.items() if made == kind]
    assert len(layers) == 2 * 4 and all(name.startswith("language_model.model.layers.") for name in layers)
    assert {linear[name] for name in ("llama_proj", "language_model.lm_head")} == {"Linear"}
    assert any(isinstance(m, AdaptedLinear) for m in model.modules()) is not merge
    assert error(logits(model), true) < (0.1 if bits == 8 else 0.35)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.scaling = 0.0
    if not merge:
        assert error(logits(model), true) > 0.3
    seeing, _ = load_model(wide_run, FP32, bits=bits, merge=merge, quantize_vision=True)
    assert sum(type(m).__name__ == kind for m in seeing.modules()) == 2 * 4 + 2 * 4
    assert error(logits(seeing), true) < (0.1 if bits == 8 else 0.35)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "within"), [(8, 0.02), (4, 0.12)])
def test_layer(dtype: torch.dtype, bits: int, within: float) -> None:
    """Whatever the rows, the dtype and outliers among the inputs: within what the bits allow."""
    torch.manual_seed(0)
    true = nn.Linear(128, 320).requires_grad_(False)
    made = quantized_linear(true.weight, true.bias.to(dtype), bits, dtype, torch.device("cpu"))
    for shape in ((1, 1, 128), (3, 20, 128)):
        x = torch.randn(shape)
        x[..., ::50] *= 40
        with torch.no_grad():
            found = made(x.to(dtype))
        assert (found.dtype, found.shape) == (dtype, (*shape[:-1], 320))
        assert error(found.float(), true(x)) < within
    assert made.weight.element_size() == 1 and made.weight.numel() == 128 * 320 * bits // 8


@needs_bitsandbytes
def test_lora_next_to_a_quantized_layer() -> None:
    torch.manual_seed(0)
    adapted = LoRALinear(64, 32, lora_r=2, lora_alpha=3, lora_dropout=0.5).eval()
    nn.init.normal_(adapted.lora_B.weight)
    base = quantized_linear(adapted.weight.detach(), adapted.bias.detach(), 8, FP32, torch.device("cpu"))
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert error(AdaptedLinear(base, adapted)(x), adapted(x)) < 0.02


@needs_bitsandbytes
def test_weights_are_read_one_at_a_time(wide_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight stays behind in its first form while others are read."""
    import weakref

    from tinygptv_ds.weights.io import Stored

    alive: list[weakref.ref] = []
    counts = []

    def counting(stored: Stored, name: str) -> object:
        value = object.__getattribute__(stored, name)
        if name != "read":
            return value

        def reading() -> Tensor:
            counts.append(sum(ref() is not None for ref in alive))
            tensor = value()
            alive.append(weakref.ref(tensor))
            return tensor

        return reading

    monkeypatch.setattr(Stored, "__getattribute__", counting, raising=False)
    load_model(wide_run, torch.bfloat16, bits=8)
    assert len(counts) > 100 and max(counts) <= 4  # the fused one is made of three


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 5}, "16, 8 or 4"),
        ({"device": "cuda"}, "torch sees 0 GPU"),
        ({"device": "tpu?"}, "there is no device"),
        ({"device": "meta"}, "cpu and cuda"),
        ({"quantize_vision": True}, "8 or 4 bits"),
        ({"overrides": ["model.phi=x"]}, "needs neither a recipe nor --set"),
    ],
)
def test_what_cannot_be_had(exported: Path, options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_model(exported, FP32, **options)


@needs_bitsandbytes
def test_bits_and_what_they_need(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="multiple of 64 wide; here one has 32"):
        load_model(exported, FP32, bits=4)
    with pytest.raises(ConfigError, match="compute in 16 bit"):
        loading.check_bits(8, torch.device("cuda"), FP32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-quant\.txt"):
        loading.check_bits(4, torch.device("cpu"), FP32)


def test_no_model_there(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_model(tmp_path / "none")
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in exported.iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    (torn / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        load_model(torn)
    (torn / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="a damaged exported folder"):
        load_model(torn)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "config.json",
            {"text_config": {"num_hidden_layers": 10**9}},
            "text_config.num_hidden_layers of ",
        ),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers"),
        ("config.json", {"qformer_config": {"hidden_size": 10**9}}, "qformer_config.hidden_size"),
        ("config.json", {"text_config": {"num_attention_heads": 0}}, "text_config.num_attention_heads of .* is 0"),
        ("config.json", {"text_config": {"num_attention_heads": -4}}, "is -4"),
        ("config.json", {"vision_config": {"patch_size": 0}}, "vision_config.patch_size"),
        ("config.json", {"text_config": {"vocab_size": "many"}}, "vocab_size"),
        ("config.json", {"text_config": [1]}, "damaged exported folder"),
        ("config.json", {"num_query_tokens": 10**9}, "query_tokens"),
        ("generation_config.json", [1], "damaged exported folder"),
        ("generation_config.json", None, "damaged exported folder .*recursion"),
        ("tokenizer.json", {}, "damaged exported folder"),
    ],
)
def test_damaged_json_of_a_folder(exported: Path, tmp_path: Path, file: str, change: object, words: str) -> None:
    """Whatever a folder's JSON claims: one line, and no model of that size is built."""
    shutil.copytree(exported, tmp_path / "model")
    path = tmp_path / "model" / file
    content = json.loads(path.read_text())
    if file == "config.json":
        for name, value in change.items():
            content[name] = content[name] | value if isinstance(value, dict) else value
    else:
        content = change
    path.write_text("[" * 100_000 if content is None else json.dumps(content))
    with pytest.raises(WeightsError, match=words) as raised:
        load_model(tmp_path / "model")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800
