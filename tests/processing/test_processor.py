"""Inference sees the tokens and pixels that training saw."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from transformers import AutoTokenizer

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence, prompt_text
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, Rendered

IMAGE = ImageTokens(token_id=299, count=tiny.QUERIES)
QUESTION = f"<Img>{IMAGE_PLACEHOLDER}</Img> what colour is the bus ? "
TEXT = TextSection(prompt_template="[INST] {} [/INST]", end_sym="###")


@pytest.fixture
def processor(weights: Path) -> TinyGPTVProcessor:
    tokenizer = AutoTokenizer.from_pretrained(weights / "phi")
    return TinyGPTVProcessor(tokenizer, tiny.IMAGE_SIZE, IMAGE.count, IMAGE.token_id, TEXT.prompt_template)


def test_the_row_of_training(processor: TinyGPTVProcessor) -> None:
    rendered = Rendered(((QUESTION, "red"),))
    row = build_sequence(rendered, 1, processor.tokenizer, TEXT, IMAGE, lambda n: 0)
    prompt = prompt_text(rendered, 1, TEXT, lambda n: 0)
    (image,) = tiny.encoded_images(1)
    inputs = processor([[image]], [prompt], add_bos_token=True)
    assert inputs["input_ids"][0].tolist() == row.input_ids[row.labels == -100].tolist()
    assert (inputs["pixel_values"].numpy() == to_pixels(image, tiny.IMAGE_SIZE)[None]).all()
    assert processor([[image]], [prompt])["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 1


def test_padding_stands_on_the_left(processor: TinyGPTVProcessor) -> None:
    first, second = tiny.encoded_images(2)
    prompts = [QUESTION, "the bus", QUESTION * 2]
    inputs = processor([[first], [], [second, first]], prompts)
    for number, prompt in enumerate(prompts):
        mask = inputs["attention_mask"][number]
        assert mask.sort().values.equal(mask)
        alone = processor([[[first], [], [second, first]][number]], [prompt])
        assert inputs["input_ids"][number][mask.bool()].tolist() == alone["input_ids"][0].tolist()
    expected = np.stack([to_pixels(image, tiny.IMAGE_SIZE) for image in (first, second, first)])
    assert (inputs["pixel_values"].numpy() == expected).all()
    assert "pixel_values" not in processor([[]], ["the bus"])


def test_the_keywords_of_transformers(processor: TinyGPTVProcessor) -> None:
    """Text and images in either order, padding and truncation."""
    first, second = (Image.open(io.BytesIO(image)).convert("RGB") for image in tiny.encoded_images(2))
    prompts = [QUESTION, f"{QUESTION} the bus"]
    expected = processor([[first], [second]], prompts)
    for inputs in (
        processor(prompts, [first, second]),
        processor(text=prompts, images=[first, second], padding=True, return_tensors="pt"),
        processor(prompts, [[first], [second]], padding="longest", truncation=True, max_length=500),
    ):
        assert inputs.keys() == expected.keys()
        assert all(inputs[name].equal(tensor) for name, tensor in expected.items())
    length = expected["input_ids"].shape[1]
    assert processor(QUESTION, first, padding="max_length", max_length=length + 3)["input_ids"].shape == (1, length + 3)
    cut = processor(prompts, [first, second], truncation=True, max_length=length - 1)["input_ids"]
    assert cut[1].equal(expected["input_ids"][1, :-1])
    with pytest.raises(DataError, match="max_length=3 would cut off an image"):
        processor(QUESTION, first, truncation=True, max_length=3)
    for options, message in (
        ({"padding": False}, "padding=False: prompts of unequal lengths"),
        ({"padding": "left"}, "padding='left'"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"truncation": True}, "needs max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(prompts, [first, second], **options)


def test_arrays_and_tensors(processor: TinyGPTVProcessor) -> None:
    image = Image.open(io.BytesIO(tiny.encoded_images(1)[0])).convert("RGB")
    expected = processor(image, QUESTION)["pixel_values"]
    array = np.asarray(image)
    forms = (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        array / 255,
        expected[0],
        expected[0].numpy(),
    )
    for form in forms:
        assert processor(text=QUESTION, images=form)["pixel_values"].equal(expected)
    for wrong in (np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5), np.int64), np.full((5, 5, 3), 2.0)):
        with pytest.raises(DataError, match=r"arrays and tensors must be \[H, W, 3\]"):
            processor(text=QUESTION, images=wrong)


def test_images_must_match(processor: TinyGPTVProcessor) -> None:
    with pytest.raises(DataError, match="1 times"):
        processor([[]], [QUESTION])
    with pytest.raises(DataError, match="decoded"):
        processor([[b"no image"]], [QUESTION])


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        ("red###blue", "###", "red"),
        (" a red bus ", "###", "a red bus"),
        ("red\nblue", "\n", "red"),
        ("", "###", ""),
        ("red###blue\n", "", "red###blue"),
    ],
)
def test_answers_end_at_the_end_symbol(answer: str, stop: str, expected: str, processor: TinyGPTVProcessor) -> None:
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.eos_token_id
    assert processor.answers(torch.tensor([[*ids, end, end]], dtype=torch.long), stop) == [expected]


def test_images_as_transformers_takes_them(processor: TinyGPTVProcessor, tmp_path: Path) -> None:
    """One image, a flat list and paths are assigned to the placeholders."""
    first, second = tiny.encoded_images(2)
    (tmp_path / "first.png").write_bytes(first)
    prompts = [QUESTION * 2, "the bus", QUESTION]
    nested = processor([[first, second], [], [first]], prompts)
    flat = processor(text=prompts, images=[first, second, str(tmp_path / "first.png")], return_tensors="pt")
    assert nested.keys() == flat.keys()
    assert all(nested[name].equal(flat[name]) for name in nested)
    alone = processor(tmp_path / "first.png", QUESTION)
    assert alone["pixel_values"].equal(nested["pixel_values"][:1])
    with pytest.raises(DataError, match="hold 3 times <ImageHere>, but there are 2 images"):
        processor([first, second], prompts)
    with pytest.raises(DataError, match="2 lists of images for 3 prompts"):
        processor([[first], [second]], prompts)


def test_a_prompt_is_worded_as_in_training(processor: TinyGPTVProcessor) -> None:
    rendered = Rendered(((QUESTION, "red"),))
    assert processor.prompt("what colour is the bus ?") == prompt_text(rendered, 1, TEXT, lambda n: 0)
    assert processor.prompt("{} ?", num_images=0) == "[INST] {} ? [/INST]"


def test_saved_and_loaded(processor: TinyGPTVProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = TinyGPTVProcessor.from_pretrained(tmp_path)
    for name in ("image_size", "num_query_tokens", "image_token_id", "prompt_template", "end_sym"):
        assert getattr(again, name) == getattr(processor, name)
    (image,) = tiny.encoded_images(1)
    ours, theirs = processor(image, QUESTION), again(image, QUESTION)
    assert all(ours[name].equal(theirs[name]) for name in ours)
