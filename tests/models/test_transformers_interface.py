"""What users of transformers do with the model: implementations of attention, caches, ways to generate, training."""

import io
from pathlib import Path

import pytest
import torch
from helpers.weight_layouts import tiny_config
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from tinygptv_ds.models.attention import causal_mask
from tinygptv_ds.models.parameters import norms, projections, train_only
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration

ROWS = {
    "input_ids": torch.tensor([[9, 9, 1, 19, 19, 19, 2, 3], [1, 19, 19, 19, 2, 3, 4, 2]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]),
    "pixel_values": torch.arange(6 * 28 * 28, dtype=torch.uint8).reshape(2, 3, 28, 28),
}
ONE = {"input_ids": ROWS["input_ids"][1:], "pixel_values": ROWS["pixel_values"][1:]}


@pytest.fixture
def model() -> TinyGPTVForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(lora_r=0)
    config.text_config.resid_pdrop = 0.0
    model = TinyGPTVForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def generated(model: TinyGPTVForConditionalGeneration, inputs: dict, **options: object) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)


def test_eager_attention(model: TinyGPTVForConditionalGeneration, tmp_path: Path) -> None:
    """The numbers of SDPA, and attention weights that add up to 1 over what a token may see."""
    model.save_pretrained(tmp_path)
    eager = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    real = ROWS["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**ROWS).logits
        output = eager(**ROWS, output_attentions=True)
    torch.testing.assert_close(output.logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert len(output.attentions) == len(model.language_model.model.layers)
    for weights in output.attentions:
        seen = weights.transpose(0, 1)[:, real]
        torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:-1]))
        assert not weights.triu(1)[1].any()
        assert not weights[0, :, 2:, :2].any()
    assert torch.equal(generated(eager, ROWS), generated(model, ROWS))
    result = generated(eager, ROWS, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True)
    assert [steps[0].shape[-2:] for steps in result.attentions[:2]] == [(8, 8), (1, 9)]
    assert len(result.hidden_states[1]) == 1 + len(model.language_model.model.layers)


def test_flex_attention(
    model: TinyGPTVForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of SDPA; not compiled here, which needs a C++ compiler and Python's headers on a CPU."""

    def not_compiled(q: Tensor, k: Tensor, v: Tensor, training: bool = False, **options: object) -> object:
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", not_compiled)
    model.save_pretrained(tmp_path)
    flex = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention").eval()
    real = ROWS["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(flex(**ROWS).logits[real], model(**ROWS).logits[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(generated(flex, ROWS), generated(model, ROWS))


def test_attention_is_changed_later(model: TinyGPTVForConditionalGeneration) -> None:
    expected = generated(model, ROWS)
    vision = model.encode_vision(ROWS["pixel_values"])
    model.set_attn_implementation("eager")
    assert model(**ROWS, output_attentions=True).attentions is not None
    assert torch.equal(generated(model, ROWS), expected)
    torch.testing.assert_close(model.encode_vision(ROWS["pixel_values"]), vision)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated(model, ROWS), expected)


def test_the_mask_of_other_implementations_is_that_of_sdpa(
    model: TinyGPTVForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An implementation that is registered with transformers gets its mask, its scaling and its layer."""
    calls = []

    def attend(module: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: float) -> tuple:
        calls.append((module.layer_idx, module.config._attn_implementation, module.is_causal, mask, options))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2), None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "own", eager_mask)
    with torch.no_grad():
        expected = model(**ROWS).logits
        model.set_attn_implementation({"": "own", "text_config": "own"})
        found = model(**ROWS).logits
    real = ROWS["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert [call[:3] for call in calls] == [(layer, "own", True) for layer in range(len(calls))]
    mask = calls[0][3] == 0
    assert torch.equal(mask.squeeze(1)[real], causal_mask(ROWS["attention_mask"], 8).squeeze(1)[real])
    assert calls[0][4]["scaling"] == model.language_model.model.layers[0].self_attn.head_dim ** -0.5


def test_flash_attention_needs_a_gpu(model: TinyGPTVForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises((ImportError, ValueError), match=r"flash_attn|FlashAttention|not available|not supported"):
            TinyGPTVForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("rows", [ROWS, ONE], ids=["padded", "one"])
def test_caches(model: TinyGPTVForConditionalGeneration, rows: dict) -> None:
    expected = generated(model, rows)
    assert torch.equal(generated(model, rows, cache_implementation="static"), expected)
    assert torch.equal(generated(model, rows, use_cache=False), expected)
    with torch.no_grad():
        whole = model(**rows).logits
        first = {name: value[:, :6] if name != "pixel_values" else value for name, value in rows.items()}
        output = model(**first, use_cache=True)
        mask = rows.get("attention_mask")
        rest = model(rows["input_ids"][:, 6:], attention_mask=mask, past_key_values=output.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_the_mask_of_a_static_cache() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(causal_mask(mask, 2, 5)[..., :3], causal_mask(mask, 2))
    assert not causal_mask(mask, 2, 5)[..., 3:].any()


def test_ways_to_generate(model: TinyGPTVForConditionalGeneration) -> None:
    expected = generated(model, ONE)
    torch.manual_seed(1)
    assistant = TinyGPTVForConditionalGeneration(tiny_config(lora_r=0)).eval()
    assert torch.equal(generated(model, ONE, assistant_model=assistant), expected)
    assert torch.equal(generated(model, ONE, assistant_model=model), expected)
    assert torch.equal(generated(model, ONE, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(generated(model, ONE, num_beams=1, num_return_sequences=1), expected)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM])
def test_other_auto_classes_name_the_right_one(
    model: TinyGPTVForConditionalGeneration, tmp_path: Path, kind: type
) -> None:
    model.save_pretrained(tmp_path)
    for load in (lambda: kind.from_pretrained(tmp_path), lambda: kind.from_config(model.config)):
        with pytest.raises(ValueError, match="load it with AutoModelForImageTextToText"):
            load()
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is TinyGPTVForConditionalGeneration


@pytest.mark.parametrize("recompute", [False, True])
def test_the_trainer_of_transformers(model: TinyGPTVForConditionalGeneration, tmp_path: Path, recompute: bool) -> None:
    """Two steps, of which the first begins with the loss of `labels`; with recomputed blocks it is the same."""
    train_only(model, projections, norms)  # the frozen Q-Former has no dropout
    rows = [{name: value[0] for name, value in ONE.items()} | {"labels": ONE["input_ids"][0]}] * 4
    with torch.no_grad():
        expected = model(**ONE, labels=ONE["input_ids"]).loss.item()
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        gradient_checkpointing=recompute,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    assert losses[1] < losses[0]


def test_more_tokens(model: TinyGPTVForConditionalGeneration, tmp_path: Path) -> None:
    """Embeddings grow and are saved; the answers stay."""
    expected = generated(model, ONE)
    vocabulary = model.config.text_config.vocab_size
    model.resize_token_embeddings(vocabulary + 5, mean_resizing=False)
    assert model.config.text_config.vocab_size == vocabulary + 5
    with torch.no_grad():
        model.get_output_embeddings().bias[vocabulary:] = -1e4
    assert torch.equal(generated(model, ONE), expected)
    model.save_pretrained(tmp_path)
    again = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(generated(again, ONE), expected)


def test_a_vocabulary_without_the_token_of_images_is_refused(model: TinyGPTVForConditionalGeneration) -> None:
    """As `len(tokenizer)` may be, which is smaller than the embedding; nothing has changed then."""
    expected = generated(model, ONE)
    with pytest.raises(ValueError, match=r"the token of images is 19, so 20 rows are the least. There are 20 already"):
        model.resize_token_embeddings(15)
    assert torch.equal(generated(model, ONE), expected)
    assert model.resize_token_embeddings(17, pad_to_multiple_of=8, mean_resizing=False).num_embeddings == 24


def test_places_without_images_are_refused(model: TinyGPTVForConditionalGeneration) -> None:
    """In generation and for a loss, where an image was forgotten; rows of text alone need none."""
    ids = ONE["input_ids"]
    for ask in (lambda: generated(model, {"input_ids": ids}), lambda: model(ids, labels=ids)):
        with pytest.raises(ValueError, match="input_ids has 3 places for images, but there is no pixel_values"):
            ask()
    text = torch.tensor([[1, 2, 3]])
    assert generated(model, {"input_ids": text}).shape == (1, 9) and model(text, labels=text).loss > 0


def test_raw_pixels_as_floats_are_refused(model: TinyGPTVForConditionalGeneration) -> None:
    """As `pixel_values.to(torch.bfloat16)` makes them of what the processor returns; normalized ones are taken."""
    raw = ONE | {"pixel_values": ONE["pixel_values"].float()}
    for ask in (lambda: generated(model, raw), lambda: model(**raw, labels=ONE["input_ids"])):
        with pytest.raises(ValueError, match="pixel_values: floats must be normalized; leave the uint8"):
            ask()
    normalized = ONE | {"pixel_values": model.normalize(ONE["pixel_values"])}
    assert torch.equal(generated(model, normalized), generated(model, ONE))


def test_logits_of_some_positions(model: TinyGPTVForConditionalGeneration) -> None:
    with torch.no_grad():
        whole = model(**ONE).logits
        for kept, expected in ((2, whole[:, -2:]), (torch.tensor([0, 5]), whole[:, [0, 5]])):
            torch.testing.assert_close(model(**ONE, logits_to_keep=kept).logits, expected)


def test_pickled_whole(model: TinyGPTVForConditionalGeneration) -> None:
    """As `torch.save(model)` does, dropout included."""
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert torch.equal(generated(torch.load(saved, weights_only=False), ONE), generated(model, ONE))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
def test_ways_to_load(model: TinyGPTVForConditionalGeneration, tmp_path: Path, options: dict) -> None:
    model.save_pretrained(tmp_path)
    again = TinyGPTVForConditionalGeneration.from_pretrained(tmp_path, **options).eval()
    assert again.dtype == options.get("dtype", torch.float32)
    assert torch.equal(generated(again, ONE)[:, :8], ONE["input_ids"])
    if again.dtype == torch.float32:
        assert torch.equal(generated(again, ONE), generated(model, ONE))


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(model: TinyGPTVForConditionalGeneration, tmp_path: Path, bits: int) -> None:
    """Every linear layer but the head is quantized, those that timm would look into and the projections included."""
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(tmp_path)
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    small = TinyGPTVForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options)
    )
    assert not small.visual_encoder.blocks[0].attn.qkv.weight.is_floating_point()
    assert not small.llama_proj.weight.is_floating_point()
    with torch.no_grad():
        expected, found = model(**ONE).logits, small(**ONE).logits
    assert torch.corrcoef(torch.stack([expected.flatten(), found.flatten()]))[0, 1] > (0.99 if bits == 8 else 0.8)
    assert generated(small, ONE).shape == generated(model, ONE).shape


def test_lora_of_peft_on_the_vit(model: TinyGPTVForConditionalGeneration) -> None:
    """An adapter on layers whose weights timm would take out has its effect."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["attn.qkv"], init_lora_weights=False)).eval()
    with torch.no_grad():
        adapted = wrapped(**ONE).logits
        with wrapped.disable_adapter():
            plain = wrapped(**ONE).logits
    assert not torch.allclose(adapted, plain)


def test_what_trl_takes(model: TinyGPTVForConditionalGeneration) -> None:
    """SFTTrainer applies the head itself to what `base_model` returns."""
    with torch.no_grad():
        output = model.base_model(**ROWS, output_hidden_states=True, use_cache=False)
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        assert torch.equal(model.get_output_embeddings()(output.last_hidden_state), output.logits)
    assert "last_hidden_state" not in output


def test_image_features(model: TinyGPTVForConditionalGeneration) -> None:
    with torch.no_grad():
        features = model.get_image_features(ONE["pixel_values"])
        embeds = model.embed(ONE["input_ids"], ONE["pixel_values"])
    assert torch.equal(embeds[0, 1:4], features[0])
