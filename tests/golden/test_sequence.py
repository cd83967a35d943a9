"""Token layout and targets of every reference case, from its strings; gaps are omitted and their positions skipped."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, TokenRow, build_sequence, prompt_ids
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, Rendered

IMAGE = -1  # marks a row of an image; no token has this id


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(golden / "full/tokenizer")


def settings(case: dict[str, Any]) -> TextSection:
    """Return the text settings: instructions are wrapped if the model's chat template is on, conversations always."""
    s = case["settings"]
    wrapped = s["prompt_template"] and (s["chat_template"] or "conv_q" in case["samples"])
    return TextSection(
        prompt_template=s["prompt_template"] if wrapped else None,
        end_sym=s["end_sym"],
        max_txt_len=s["max_txt_len"],
        max_context_len=s["max_context_len"],
    )


def turns(case: dict[str, Any], number: int) -> tuple[tuple[str | None, str], ...]:
    """Return sample `number` as questions and answers."""
    samples = case["samples"]
    if "conv_q" in samples:
        symbol = samples["connect_sym"][number]
        return tuple(zip(samples["conv_q"][number].split(symbol), samples["conv_a"][number].split(symbol), strict=True))
    question = samples.get("instruction_input")
    if question is None and case["settings"]["prompt_list"]:
        question = [case["settings"]["prompt_list"][0]] * len(samples["answer"])
    return ((None if question is None else question[number], samples["answer"][number]),)


def images(case: dict[str, Any], number: int) -> int:
    if not case["has_image"]:
        return 0
    return case["samples"].get("length", [1] * (number + 1))[number]


def test_training_rows(training_case: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    case = read(training_case)
    with safe_open(training_case.with_suffix(".safetensors"), framework="np") as file:
        attended, targets = file.get_tensor("attention_mask"), file.get_tensor("targets")
    image = ImageTokens(IMAGE, case["query_rows_per_image"])
    first_image = holes = 0
    assert case["layout"]
    for number, layout in enumerate(case["layout"]):
        count = images(case, number)
        rendered = Rendered(turns(case, number))
        ours = build_sequence(rendered, count, tokenizer, settings(case), image, draw=lambda n: 0)
        kept = [t for t, item in enumerate(layout) if item != "pad" and attended[number, t]]
        holes += sum(item != "pad" for item in layout) - len(kept)
        assert ours.position_ids.tolist() == kept
        assert in_words(ours, image, first_image) == [layout[t] for t in kept]
        assert ours.labels.tolist() == [targets[number, t] for t in kept]
        assert all(targets[number, t] == IGNORE for t in range(len(layout)) if t not in kept)
        first_image += count
    assert holes == case["attention_holes"]


def in_words(sequence: TokenRow, image: ImageTokens, first_image: int) -> list[int | dict[str, int]]:
    """Return a row as the reference writes it: token ids, and {image, row} for an image."""
    items: list[int | dict[str, int]] = sequence.input_ids.tolist()
    for row, index in zip(sequence.image_rows, sequence.image_index, strict=True):
        assert items[row] == IMAGE
        number, query = divmod(int(index), image.count)
        items[row] = {"image": first_image + number, "row": query}
    assert IMAGE not in items
    return items


def test_prompts_of_inference(prompt_case: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts of inference have no BOS token, and their strings are unchanged."""
    case = read(prompt_case)
    image = ImageTokens(IMAGE, case["query_rows_per_image"])
    for text, layout in zip(case["texts"], case["layout"], strict=True):
        expected = [IMAGE if isinstance(item, dict) else item for item in layout if item != "pad"]
        assert prompt_ids(tokenizer, text, text.count(IMAGE_PLACEHOLDER), image) == expected
