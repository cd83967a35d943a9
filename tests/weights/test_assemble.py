"""Every parameter of a built model comes from a file or is initialised on purpose, and anything else is refused."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.weight_layouts import PHI, blip2_state, tokenizer
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from tinygptv_ds.config.recipe import ModelSection, TextSection
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.parameters import lora, norms, projections
from tinygptv_ds.weights.assemble import build_model, model_config
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS
from tinygptv_ds.weights.layouts.tinygptv import original_name

TEXT = TextSection(prompt_template="[INST] {} [/INST]", end_sym="###")
Base = Callable[..., ModelSection]


def build(section: ModelSection, frozen_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_model(section, TEXT, frozen_dtype=frozen_dtype).named_parameters()}


def is_initialized(name: str) -> bool:
    return projections(name) or lora(name) or ADDED_NORMS.fullmatch(name) is not None


@pytest.mark.parametrize("layout", ["split", "fused", "remote"])
def test_base_weights(base: Base, values: dict[str, Tensor], layout: str) -> None:
    built = build(base(layout=layout, lora_r=3))
    assert built.keys() == values.keys()
    for name in values:
        if not is_initialized(name):
            assert torch.equal(built[name], values[name]), name


def test_fresh_values(base: Base) -> None:
    """Projections as torch's linear layers from the caller's seed, LoRA without effect, added norms neutral."""
    section = base(lora_r=3)
    torch.manual_seed(5)
    first = build(section)
    torch.manual_seed(5)
    again = build(section)
    torch.manual_seed(6)
    other = build(section)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if ADDED_NORMS.fullmatch(name):
            assert torch.all(tensor == (1 if name.endswith(".weight") else 0)), name
        if ".lora_B." in name:
            assert not tensor.any()
        if projections(name) or ".lora_A." in name:
            assert not torch.equal(tensor, other[name]), name
            fan_in = first[name.replace(".bias", ".weight")].shape[1]
            assert 0 < tensor.abs().max() <= fan_in**-0.5 * 1.0001, name


def test_dtypes(base: Base) -> None:
    built = build(base(lora_r=3), torch.bfloat16)
    for name, tensor in built.items():
        trains = projections(name) or lora(name) or norms(name.replace(".bias", ".weight"))
        assert tensor.dtype == (torch.float32 if trains else torch.bfloat16), name


def test_no_memory_is_left_uninitialised(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled with NaN before loading, nothing is NaN after, timm's unsaved key bias included."""
    module = torch.nn.Module
    to_empty = module.to_empty

    def poisoned(self: torch.nn.Module, **kwargs: object) -> torch.nn.Module:
        out = to_empty(self, **kwargs)
        for tensor in [*out.parameters(), *out.buffers()]:
            tensor.data.fill_(float("nan"))
        return out

    monkeypatch.setattr(module, "to_empty", poisoned)
    model = build_model(base(lora_r=3), TEXT, frozen_dtype=torch.float32)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert [name for name, tensor in tensors.items() if tensor.isnan().any()] == []
    assert not any(buffer.any() for name, buffer in model.named_buffers() if name.endswith("k_bias"))


def test_configuration(base: Base) -> None:
    config = model_config(base(lora_r=3, lora_alpha=6.0, resid_dropout=0.25, image_size=56), TEXT)
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size) == (56, 14, 8, 10)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (2, 2)
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.intermediate_size) == (6, 3, 8)
    assert (qformer.encoder_hidden_size, qformer.cross_attention_frequency) == (8, 2)
    assert (text.hidden_size, text.num_hidden_layers, text.resid_pdrop) == (12, 2, 0.25)
    assert (config.num_query_tokens, config.proj_hidden_size, config.image_token_id) == (3, 5, 19)
    assert (config.lora_r, config.lora_alpha) == (3, 6.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (9, 9, 9)
    assert (config.prompt_template, config.end_sym) == ("[INST] {} [/INST]", "###")


def test_a_value_beyond_fp16_is_refused(base: Base) -> None:
    section = base(eva=lambda state: state | {"blocks.1.norm1.bias": torch.full((8,), 1e5)})
    with pytest.raises(WeightsError, match=r"blocks\.1\.norm1\.bias holds values up to 1e\+05, above fp16's"):
        build(section, torch.float16)


def test_the_tokenizer_has_the_eos_token(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    """A config.json written with the defaults of transformers' PhiConfig ends at 2, which is '#'."""
    section = base()
    (Path(section.phi) / "config.json").write_text(json.dumps(PHI | {"eos_token_id": 2}))
    with caplog.at_level(logging.WARNING, logger="tinygptv_ds"):
        config = model_config(section, TEXT)
    assert config.eos_token_id == config.text_config.eos_token_id == 9
    assert "the EOS token is 2 in config.json and 9 in the tokenizer" in caplog.text


def test_positions_are_interpolated(base: Base, values: dict[str, Tensor]) -> None:
    positions = build(base(image_size=56))["visual_encoder.pos_embed"]
    assert positions.shape == (1, 17, 8)
    assert torch.equal(positions[:, :1], values["visual_encoder.pos_embed"][:, :1])


def test_added_norms_in_the_phi_folder_are_used(base: Base, values: dict[str, Tensor]) -> None:
    """All of a kind or none: a transformers Phi with `qk_layernorm` has its own."""
    q_norms = {n: t for n, t in values.items() if ".q_layernorm." in n}
    with_norms = {n.removeprefix("language_model."): t for n, t in q_norms.items()}
    built = build(base(phi=lambda state: state | with_norms))
    assert all(torch.equal(built[name], tensor) for name, tensor in q_norms.items())

    with_norms.pop("model.layers.1.self_attn.q_layernorm.bias")
    with pytest.raises(WeightsError, match=r"missing: language_model\.model\.layers\.1\.self_attn\.q_layernorm\.bias"):
        build(base(phi=lambda state: state | with_norms))


def test_the_report(base: Base, values: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tinygptv_ds"):
        build(base(lora_r=3))
    blip2 = sum(name.startswith(("qformer.", "ln_vision.", "query_tokens")) for name in values)
    vit = sum(name.startswith("visual_encoder.") for name in values)
    block = sum(".blocks.0." in name for name in values)
    assert f"eva_vit_g.pth: {vit} tensors loaded, {block + 4} ignored" in caplog.text
    assert f"blip2.pth: {blip2} tensors loaded, 8 ignored" in caplog.text
    assert "initialized: 4 tensors of projections, 8 tensors of LoRA, 10 tensors of added norms" in caplog.text


@pytest.mark.parametrize("kind", [Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval])
def test_transformers_own_blip2(base: Base, tmp_path: Path, kind: type) -> None:
    """A folder as transformers saves it: query tokens, ln_vision and Q-Former are taken, the rest is known by name."""
    torch.manual_seed(1)
    theirs = kind(blip2_config(with_text=kind is Blip2ForImageTextRetrieval))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    theirs.save_pretrained(tmp_path / "hf")
    state = theirs.state_dict()
    built = build(dataclasses.replace(base(), qformer=str(tmp_path / "hf")))
    ours = {n: t for n, t in built.items() if n.startswith(("qformer.", "query_tokens"))}
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())
    for ending in ("weight", "bias"):
        assert torch.equal(built[f"ln_vision.{ending}"], state[f"vision_model.post_layernorm.{ending}"])


def blip2_config(with_text: bool) -> Blip2Config:
    sizes = {"num_attention_heads": 2, "intermediate_size": 8}
    return Blip2Config(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "image_size": 28, **sizes},
        qformer_config={
            "hidden_size": 6,
            "num_hidden_layers": 3,
            "encoder_hidden_size": 8,
            "vocab_size": 9,
            "use_qformer_text_input": with_text,
            **sizes,
        },
        text_config={"model_type": "t5", "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9},
        num_query_tokens=3,
        image_text_hidden_size=4,
    )


def without(name: str) -> Callable[[dict], dict]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_one(name: str, *shape: int) -> Callable[[dict], dict]:
    return lambda state: state | {name: torch.zeros(shape)}


LAYER = "model.layers.0."
CROSS = "Qformer.bert.encoder.layer.0.crossattention.output.dense.bias"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("phi", without(LAYER + "mlp.fc1.bias"), r"missing: language_model\.model\.layers\.0\.mlp\.fc1\.bias"),
        (
            "phi",
            with_one("model.layers.7.mlp.fc1.bias", 16),
            r"unexpected: .*layers\.7.*config\.json is of another one",
        ),
        ("phi", with_one(LAYER + "mlp.fc1.bias", 9), r"fc1\.bias is \[9\] instead of \[16\]"),
        ("phi", without("lm_head.weight"), r"missing: language_model\.lm_head\.weight"),
        ("eva", without("blocks.1.attn.q_bias"), r"missing: visual_encoder\.blocks\.1\.attn\.q_bias"),
        ("eva", with_one("blocks.0.gamma_1", 8), r"unexpected: visual_encoder\.blocks\.0\.gamma_1"),
        ("eva", with_one("blocks.0.norm1.bias", 5), r"norm1\.bias is \[5\] instead of \[8\]"),
        ("eva", without("cls_token"), "not an EVA ViT: cls_token missing"),
        ("qformer", without(CROSS), r"missing: qformer\.encoder\.layer\.0\.crossattention\.output\.dense\.bias"),
        ("qformer", with_one("Qformer.bert.surprise", 1), r"unexpected: qformer\.surprise"),
        ("qformer", without("query_tokens"), "not a BLIP-2 Q-Former: query_tokens missing"),
        ("qformer", without("ln_vision.bias"), r"missing: ln_vision\.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(base: Base, part: str, change: Callable, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        build(base(**{part: change}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"eva_vit_depth": 4}, "3 blocks, but 4 are to be used; set model.eva_vit_depth to 3"),
        ({"eva_vit_heads": 3}, "does not divide into 3 heads; set model.eva_vit_heads"),
        ({"qformer_heads": 4}, "does not divide into 4 heads; set model.qformer_heads"),
        ({"image_size": 30}, "patches of 14 pixels do not tile 30"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(base: Base, section: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        model_config(base(**section), TEXT)


def test_parts_of_two_models_are_refused(base: Base) -> None:
    def wider(state: dict) -> dict:
        return {n: torch.zeros(6, 16) if "crossattention.self.key.weight" in n else t for n, t in state.items()}

    with pytest.raises(WeightsError, match=r"is 8 wide, but the Q-Former .* reads features of 16"):
        model_config(base(qformer=wider), TEXT)


def test_a_full_vocabulary_is_refused(base: Base) -> None:
    section = base()
    tokenizer(last=19).save_pretrained(section.phi)
    with pytest.raises(WeightsError, match="ids up to 19 of a vocabulary of 20, whose last row must be free"):
        model_config(section, TEXT)


@pytest.mark.parametrize("part", ["phi", "eva_vit", "qformer", "init_from"])
def test_a_missing_file_is_named(base: Base, tmp_path: Path, part: str) -> None:
    section = dataclasses.replace(base(), **{part: str(tmp_path / "nowhere")})
    with pytest.raises(WeightsError, match="nowhere"):
        build(section)


def test_a_folder_without_tokenizer_is_refused(base: Base) -> None:
    section = base()
    for file in Path(section.phi).glob("token*"):
        file.unlink()
    with pytest.raises(WeightsError, match="no usable tokenizer"):
        model_config(section, TEXT)


def test_nothing_is_read_before_all_fits(base: Base, values: dict[str, Tensor], tmp_path: Path) -> None:
    """A mistake in the last file shows before the gigabytes of the first are copied."""
    state = {original_name(n, lora=False): torch.zeros(1) for n in values if norms(n) or projections(n)}
    torch.save({"model": state}, tmp_path / "wrong.pth")
    copied = []
    section = dataclasses.replace(base(), init_from=str(tmp_path / "wrong.pth"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinygptv_ds.weights.assemble.copy_weights", lambda *a: copied.append(a))
        with pytest.raises(WeightsError, match="wrong shape"):
            build(section)
    assert copied == []


def test_lavis_names_there_and_back(values: dict[str, Tensor]) -> None:
    from tinygptv_ds.weights.layouts.blip2 import canonical_name

    state = blip2_state(values)
    used = {name for name in state if canonical_name(name) is not None}
    assert {canonical_name(name) for name in used} == {
        n for n in values if n.startswith(("qformer.", "query_tokens", "ln_vision."))
    }
