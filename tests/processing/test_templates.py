"""Prompts are to the letter those of the original's demos and benchmarks, and those of training, in any turn."""

from pathlib import Path

import pytest
from helpers import tiny
from transformers import AutoTokenizer

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.config.template_names import TEMPLATE_NAMES
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.generate.conversation import Conversation
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence
from tinygptv_ds.processing.templates import TEMPLATES, choose_template
from tinygptv_ds.processing.text import render

IMAGE = "<Img><ImageHere></Img>"
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
STAGE4, STAGE3 = "[INST] {} [/INST]", "###Human: {} ###Assistant: "


@pytest.mark.parametrize(
    ("wanted", "first", "later"),
    [
        ("A", f"{SYSTEM}###Human: {IMAGE} what?###Assistant: ", "a bus###Human: and?###Assistant: "),
        ("B", f"<s>[INST] {IMAGE} what? [/INST]", "a bus<s>[INST] and? [/INST]"),
        ("C", f"###Human: {IMAGE} what?###Assistant: ", "a bus###Human: and?###Assistant: "),
    ],
)
def test_the_originals(wanted: str, first: str, later: str) -> None:
    """Specified by its demos and benchmarks: no BOS token, "###" stops, one text to tokenise."""
    talk = Conversation(choose_template(wanted, STAGE4, "###"))
    prompt = talk.ask("what?", ["p.jpg"])
    assert (prompt.parts, prompt.add_bos_token, prompt.stop) == ((first,), False, ("###",))
    talk.add_answer("a bus")
    assert talk.ask("and?").parts == (first + later,)


@pytest.mark.parametrize("template", [STAGE3, STAGE4, "<{}>"])
def test_the_rows_of_training(weights: Path, template: str) -> None:
    """Every token of a conversation, of which the training leaves out the BOS tokens that nothing looks at."""
    text = TextSection(prompt_template=template, end_sym="###", max_txt_len=999)
    turns = [["what?", "###"], ["{} and?", "yes [INST]"], ["so?", "end"]]
    rendered = render({"conversation": turns}, 1, lambda _: 0)
    tokenizer = AutoTokenizer.from_pretrained(weights / "phi")
    trained = build_sequence(rendered, 1, tokenizer, text, ImageTokens(299, tiny.QUERIES), lambda _: 0)
    processor = TinyGPTVProcessor(tokenizer, tiny.IMAGE_SIZE, tiny.QUERIES, 299, template)
    talk = Conversation(choose_template(None, template, "###"))
    for number, (question, answer) in enumerate(turns):
        prompt = talk.ask(question, ["p.jpg"] if number == 0 else [])
        talk.add_answer(answer)
    row = processor.row(prompt.parts, 1, add_bos_token=prompt.add_bos_token)
    last = len(processor.row(("end###",), 0, add_bos_token=False))
    assert row == trained.input_ids.tolist()[:-last]
    if template != "<{}>":
        assert "".join(prompt.parts[:1]) == processor.prompt("what?")


def test_what_the_checkpoint_calls_for() -> None:
    assert choose_template(None, STAGE4, "###").question == STAGE4
    assert choose_template(None, STAGE3, "###").question == STAGE3
    captions = choose_template(None, None, "\n")
    assert (captions.name, captions.stop) == ("A", ("###", "\n"))
    bare = choose_template("training", None, "\n")
    prompt = Conversation(bare).ask("<ImageHere>", ["p.jpg"])
    assert (prompt.text, prompt.add_bos_token, prompt.stop) == ("<ImageHere>", True, ("\n",))
    own = choose_template("Q: {} A:", STAGE4, "###")
    assert Conversation(own).ask("x {}").text == "Q: x {} A:"
    for wrong in ("D", "{} {}", ""):
        with pytest.raises(ConfigError, match=r"--template must be one of training, benchmark, A, B, C, or a text"):
            choose_template(wrong, None, "###")


def test_every_name_has_a_template() -> None:
    for name in TEMPLATE_NAMES:
        assert Conversation(choose_template(name, STAGE4, "###")).ask("what?").text.count("what?") == 1
    assert {*TEMPLATE_NAMES} == {"training", "benchmark", *TEMPLATES}
    assert choose_template("benchmark", STAGE4, "\n") == choose_template("C", STAGE4, "\n")


def test_images_come_in_any_turn() -> None:
    talk = Conversation(choose_template("C", None, "###"))
    talk.ask("what?")
    talk.add_answer("no <ImageHere> there")
    prompt = talk.ask("and here?", ["a.jpg", "b.jpg"])
    assert prompt.text == f"###Human: what?###Assistant: no  there###Human: {IMAGE * 2} and here?###Assistant: "
    assert talk.images == ["a.jpg", "b.jpg"]
    again = talk.ask("<ImageHere> or <ImageHere>?", ["c.jpg", "d.jpg"])  # the one before was not answered
    assert again.text.endswith("###Human: <ImageHere> or <ImageHere>?###Assistant: ")
    assert talk.images == ["c.jpg", "d.jpg"]
    with pytest.raises(DataError, match="holds 1 times <ImageHere>, but comes with 0"):
        talk.ask("<ImageHere>")
