"""Rows of training samples: invariants for any text, and the mistakes that are named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, build_sequence, prompt_ids, prompt_text, tokenize, wrap
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, Rendered, load_prompts

IMAGE = ImageTokens(token_id=-1, count=4)
BOS = 0


class Letters:
    """A tokenizer whose tokens are characters; the BOS token is written as \\0."""

    bos_token_id = BOS

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


LETTERS: PreTrainedTokenizerBase = Letters()  # only these two of its members are used
WORDS = st.text(st.sampled_from("ab{}[]!? é"), max_size=12)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


def first(n: int) -> int:
    return 0


@settings(max_examples=200, deadline=None)
@given(turns=TURNS, images=st.integers(0, 3), max_txt=st.integers(1, 60), max_context=st.integers(1, 60))
def test_any_row(turns: list[tuple[str, str]], images: int, max_txt: int, max_context: int) -> None:
    """A row starts with its only BOS token; targets equal its tokens; positions rise; images are in order and whole."""
    (question, answer), *later = turns
    turns = [(IMAGE_PLACEHOLDER * images + question, answer), *later]
    text = TextSection(prompt_template="<{}>", end_sym="#", max_txt_len=max_txt, max_context_len=max_context)
    row = build_sequence(Rendered(tuple(turns)), images, LETTERS, text, IMAGE, first)
    assert row.input_ids[0] == BOS and (row.input_ids[1:] != BOS).all()
    targets = row.labels != IGNORE
    assert (row.labels[targets] == row.input_ids[targets]).all()
    assert not targets[0]
    assert row.position_ids[0] == 0 and (np.diff(row.position_ids) >= 1).all()
    assert (row.input_ids[row.image_rows] == IMAGE.token_id).all()
    assert (row.image_index == np.arange((row.input_ids == IMAGE.token_id).sum())).all()
    prompt = 1 + 2 + images * IMAGE.count + len(question)
    prompt = min(prompt, 1 + max_context) if images else prompt
    assert row.position_ids[-1] < prompt + max_txt
    # Skipped positions are the BOS tokens of later questions within the length.
    spoken = "".join(chr(t) for t in row.labels[targets])
    assert "".join(answer + "#" for _, answer in turns).startswith(spoken)


def test_a_conversation_letter_by_letter() -> None:
    text = TextSection(prompt_template="({})", end_sym="#", max_txt_len=9)
    row = build_sequence(Rendered((("q", "ab"), ("r", "cd"), ("s", "ef"))), 0, LETTERS, text, IMAGE, first)
    #                  position 0  1  2  3  4  5  6 [7] 8  9 10 11 12 | cut at 9 answer tokens
    assert "".join(map(chr, row.input_ids)) == "\0(q)ab#(r)cd"
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert "".join(chr(t) if t != IGNORE else "." for t in row.labels) == "....ab#...cd"


def test_an_image_truncated_by_the_context_length() -> None:
    """The remaining rows are the first ones of the image."""
    text = TextSection(max_context_len=6, end_sym="#")
    row = build_sequence(Rendered(((f"ab{IMAGE_PLACEHOLDER}cd", "x"),)), 1, LETTERS, text, IMAGE, first)
    assert row.input_ids.tolist() == [BOS, *map(ord, "ab"), -1, -1, -1, -1, *map(ord, "x#")]
    text = TextSection(max_context_len=4, end_sym="#")
    row = build_sequence(Rendered(((f"ab{IMAGE_PLACEHOLDER}cd", "x"),)), 1, LETTERS, text, IMAGE, first)
    assert row.image_index.tolist() == [0, 1]
    # Text alone is not cut, as in the original.
    row = build_sequence(Rendered((("abcdefgh", "x"),)), 0, LETTERS, text, IMAGE, first)
    assert "".join(map(chr, row.input_ids)) == "\0abcdefghx#"


def test_a_bare_caption_is_its_image_alone() -> None:
    row = build_sequence(Rendered(((None, "xy"),)), 1, LETTERS, TextSection(end_sym="\n"), IMAGE, first)
    assert row.input_ids.tolist() == [BOS, -1, -1, -1, -1, *map(ord, "xy\n")]
    assert row.labels.tolist() == [IGNORE] * 5 + [*map(ord, "xy\n")]


def test_the_prompt_pool_is_drawn_from() -> None:
    text = TextSection(prompts="stage3", prompt_template="###Human: {} ###Assistant: ")
    pool = load_prompts()["stage3"]
    drawn = [prompt_text(Rendered(((None, "a"),)), 2, text, lambda n, i=i: i) for i in range(len(pool))]
    assert len(set(drawn)) == len(pool) == 4
    assert all(prompt.count(IMAGE_PLACEHOLDER) == 2 for prompt in drawn)
    assert all(prompt.startswith("###Human: <Img>") and prompt.endswith(" ###Assistant: ") for prompt in drawn)


def test_braces_of_a_question_stay() -> None:
    """Braces in a question are kept, since boxes are written in them."""
    assert wrap("[INST] {} [/INST]", "what is {<1><2><3><4>} or {}?") == "[INST] what is {<1><2><3><4>} or {}? [/INST]"
    assert wrap(None, "{}") == "{}"


@pytest.mark.parametrize(("prompt", "images"), [("no place", 1), (IMAGE_PLACEHOLDER, 0), (IMAGE_PLACEHOLDER, 2)])
def test_placeholders_must_match(prompt: str, images: int) -> None:
    found = prompt.count(IMAGE_PLACEHOLDER)
    with pytest.raises(DataError, match=rf"holds {found} times {IMAGE_PLACEHOLDER}, but there are {images} image"):
        prompt_ids(LETTERS, prompt, images, IMAGE)


def test_empty_texts_have_no_tokens() -> None:
    assert tokenize(LETTERS, "") == []
    row = build_sequence(Rendered((("", ""),)), 0, LETTERS, TextSection(end_sym="#"), IMAGE, first)
    assert row.input_ids.tolist() == [BOS, ord("#")]
