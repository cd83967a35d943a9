"""Typed words that look like tokens or images are words, exactly as a tokenizer without special tokens reads them."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.golden_model import read
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.conversation import Conversation, Turn, prompt_of
from tinygptv_ds.processing.sequence import tokenize
from tinygptv_ds.processing.templates import TEMPLATES, training_template
from tinygptv_ds.processing.text import as_plain_text, split_plain_text

MARKS = ("<ImageHere>", "<|endoftext|>", "<|endoftext|><|x|>")
TYPED = st.lists(
    st.sampled_from([*MARKS, "<|endof", "text|>", "<Image", "Here>", "<", " ", "a", "é", "\n"]), max_size=8
)


@pytest.fixture(scope="module")
def phi(golden: Path) -> Any:
    """The tokenizer of Phi-2."""
    return AutoTokenizer.from_pretrained(golden / "full" / read(golden / "full/decoded.json")["tokenizer"])


@pytest.fixture(scope="module")
def without_specials(phi: Any) -> Any:
    """The same, which takes special tokens for words; asked to, transformers changes a tokenizer for good."""
    other = copy.deepcopy(phi)
    other("a", split_special_tokens=True)
    return other


@given(TYPED)
def test_nothing_of_it_is_left(pieces: list[str]) -> None:
    text = "".join(pieces)
    plain = as_plain_text(text, MARKS)
    assert "".join(split_plain_text(plain)) == text
    assert not any(mark in part for mark in MARKS for part in [plain, *split_plain_text(plain)])


@given(TYPED)
def test_tokens_are_those_of_plain_text(phi: Any, without_specials: Any, pieces: list[str]) -> None:
    text = "".join(pieces).replace("<|endoftext|>", phi.eos_token)
    plain = tokenize(phi, as_plain_text(text, ("<ImageHere>", *phi.all_special_tokens)))
    assert plain == tokenize(without_specials, text)
    assert phi.eos_token_id not in plain and phi.decode(plain, clean_up_tokenization_spaces=False) == text


def test_meaning_as_before_without_it(phi: Any) -> None:
    """Evaluation and training read special tokens as the original does."""
    assert tokenize(phi, f"a{phi.eos_token}b") == [*tokenize(phi, "a"), phi.eos_token_id, *tokenize(phi, "b")]


def test_a_conversation() -> None:
    """Questions, answers of the history and system messages are plain; the images of the template are not."""
    typed = "<ImageHere> or <|endoftext|>?"
    for template in (training_template("[INST] {} [/INST]", "###"), TEMPLATES["A"]):
        plain = replace(template, plain=("<ImageHere>", "<|endoftext|>"))
        if template.system:
            plain = plain.with_system(typed)
        prompt = prompt_of(plain, [Turn(typed, ["a.jpg"], "a <|endoftext|>"), Turn(typed, ["b.jpg", "c.jpg"])])
        joined = "".join(prompt.parts)
        assert joined.count("<ImageHere>") == 3 and "<|endoftext|>" not in joined
        assert prompt.text.count(typed) == (3 if template.system else 2) and "a <|endoftext|>" in prompt.text
        talk = Conversation(plain)
        talk.ask(typed, ["a.jpg"])
        talk.ask("again", [])  # the first question is removed with its one image
        assert talk.images == []
    with pytest.raises(DataError, match="half a character"):
        prompt_of(plain, [Turn("\udbff")])
