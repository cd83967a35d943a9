"""The chat template gives the tokens of `chat` and the server, for any messages, and the pipeline takes messages."""

import base64
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tinygptv_ds.apps.serve.request_schema import Message
from tinygptv_ds.apps.serve.turns import turns_of
from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.conversation import prompt_of
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.templates import choose_template

TEMPLATES = ["[INST] {} [/INST]", "###Human: {} ###Assistant: ", "{}", "'q' \\n{}\n\U0001f600{{", None]
TEXTS = st.sampled_from(["what is it?", "{<12><3>}", "[vqa] a\nb", "a # b", "'", "0"])


@functools.cache
def processor(tokenizer: PreTrainedTokenizerBase, template: str | None) -> TinyGPTVProcessor:
    return TinyGPTVProcessor(tokenizer, tiny.IMAGE_SIZE, 3, len(tokenizer), template)


@pytest.fixture(scope="module")
def tokenizer(weights: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(weights / "phi")


@st.composite
def conversations(draw: st.DrawFn) -> list[dict]:
    """Messages of any roles with a user's somewhere, the last one a user's; texts and images in any order."""
    messages = []
    for role in [*draw(st.lists(st.sampled_from(["system", "user", "user", "assistant"]), max_size=6)), "user"]:
        content: list[dict] = [{"type": "text", "text": draw(TEXTS)}]
        if role == "user":
            images = [{"type": "image", "image": tiny.encoded_images(1)[0]}] * draw(st.integers(0, 2))
            content = draw(st.permutations(content + images))
        messages.append(
            {"role": role, "content": content if role == "user" or draw(st.booleans()) else content[0]["text"]}
        )
    return messages


def tokens_of_the_server(processor: TinyGPTVProcessor, messages: list[dict]) -> list[int]:
    """As `serve` makes the prompt, whose images are placed in front of their question."""
    parsed, images = [], []
    for message in messages:
        parts = (
            [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            else message["content"]
        )
        parsed.append(Message(role=message["role"], content=[part for part in parts if part["type"] == "text"]))
        images.append([b"" for part in parts if part["type"] == "image"])
    template = choose_template(None, processor.prompt_template, processor.end_sym)
    system, turns = turns_of(parsed, images, has_system=bool(template.system))
    prompt = prompt_of(template.with_system(system) if system is not None else template, turns)
    return processor.row(prompt.parts, len(prompt.images), add_bos_token=prompt.add_bos_token)


@given(messages=conversations(), template=st.sampled_from(TEMPLATES[:3] + TEMPLATES[4:]))
def test_the_tokens_of_the_server(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: str | None
) -> None:
    ours = processor(tokenizer, template)
    inputs = ours.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = tokens_of_the_server(ours, messages)
    if template == "{}":  # nothing separates a question from its answer
        text = tokenizer.decode([token for token in inputs["input_ids"][0].tolist() if token < len(tokenizer)])
        assert text == tokenizer.decode([token for token in expected if token < len(tokenizer)])
    else:
        assert inputs["input_ids"][0].tolist() == expected
    images = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    assert len(inputs.get("pixel_values", [])) == images
    text = ours.apply_chat_template(messages, add_generation_prompt=True)
    image = tiny.encoded_images(1)[0]
    assert ours(text=text, images=[image] * images)["input_ids"].equal(inputs["input_ids"])


def test_the_wording(tokenizer: PreTrainedTokenizerBase) -> None:
    image = {"type": "image", "image": tiny.encoded_images(1)[0]}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "what?"}, image]},
        {"role": "assistant", "content": "red"},
    ]
    bos = tokenizer.bos_token
    asked = f"{bos}'q' \\n<Img><ImageHere></Img> Be brief.\nwhat? \n\U0001f600{{{{"
    ours = processor(tokenizer, TEMPLATES[3])
    assert ours.apply_chat_template(messages[:2]) == asked
    assert ours.apply_chat_template(messages) == asked + "red###"
    assert ours.apply_chat_template(messages, continue_final_message=True) == asked + "red"
    again = ours.apply_chat_template([*messages, {"role": "user", "content": "and?"}])
    assert again == f"{asked}red###{bos}'q' \\nand? \n\U0001f600{{{{"
    of_the_demo = processor(tokenizer, None).apply_chat_template(messages[:2])
    assert of_the_demo == "Be brief.###Human: <Img><ImageHere></Img> what?###Assistant: "


@given(messages=conversations(), template=st.sampled_from(TEMPLATES))
def test_the_mask_of_what_the_assistant_wrote(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: str | None
) -> None:
    """The tokens of the mask are those of the answers and of what ends them, as the loss of training counts them."""
    answers, asked, after = "", False, False
    end = choose_template(None, template, "###").after_answer
    for message in [*messages, {"role": "assistant", "content": "at last"}, {"role": "user", "content": ""}]:
        text = message["content"] if isinstance(message["content"], str) else message["content"][0].get("text", "")
        if message["role"] == "assistant" and asked:
            answers, after = f"{answers}\n{text}" if after else answers + text, True
        if message["role"] == "user":
            answers, asked, after = answers + end if after else answers, True, False
    inputs = processor(tokenizer, template).apply_chat_template(
        [*messages, {"role": "assistant", "content": "at last"}],
        **{"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True},
    )
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape and "offset_mapping" not in inputs
    kept = inputs["input_ids"][inputs["assistant_masks"].bool()]
    if template == "{}" or template is None:  # the last token before an answer may hold its first letters
        assert tokenizer.decode(kept).endswith("at last###")
    else:
        assert tokenizer.decode(kept) == answers


def test_masks_of_a_padded_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    image = {"type": "image", "image": tiny.encoded_images(1)[0]}
    red = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "red"}]
    longer = [
        *red,
        {"role": "user", "content": "and this one?"},
        {"role": "assistant", "content": "it is \u00fc\U0001f600"},
    ]
    ours = processor(tokenizer, TEMPLATES[1])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    for side in ("left", "right"):
        inputs = ours.apply_chat_template([red, longer], processor_kwargs={"padding_side": side}, **options)
        kept = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)]
        assert [tokenizer.decode(ids) for ids in kept] == ["red###", "red###it is \u00fc\U0001f600###"]
    cut = ours.apply_chat_template(longer, processor_kwargs={"truncation": True, "max_length": 24}, **options)
    assert cut["assistant_masks"].shape == cut["input_ids"].shape == (1, 24)
    offsets = ours(text="a bus", add_bos_token=True, return_offsets_mapping=True)["offset_mapping"][0]
    assert offsets[0] == (0, 0) and offsets[1][0] == 0 and offsets[-1][1] == 5


def test_a_batch_of_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    image = {"type": "image", "image": tiny.encoded_images(1)[0]}
    batch = [
        [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}],
        [{"role": "user", "content": "which is the larger one?"}],
    ]
    ours = processor(tokenizer, TEMPLATES[0])
    inputs = ours.apply_chat_template(batch, tokenize=True, return_dict=True)
    rounded = ours.apply_chat_template(
        batch, tokenize=True, return_dict=True, processor_kwargs={"pad_to_multiple_of": 64, "padding_side": "right"}
    )
    assert rounded["input_ids"].shape[1] == 64
    assert rounded["attention_mask"].sum(1).equal(inputs["attention_mask"].sum(1))
    for number, messages in enumerate(batch):
        mask = inputs["attention_mask"][number].bool()
        alone = ours.apply_chat_template(messages, tokenize=True)
        assert inputs["input_ids"][number][mask].equal(alone[0])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "1"}, "role tool: there are system, user and assistant"),
        ({"role": "user", "content": [{"type": "video"}]}, "user: content of type video"),
        ({"role": "system", "content": [{"type": "image"}]}, "system: content of type image"),
        ({"role": "user", "content": "<ImageHere> what?"}, "holds 1 <ImageHere>, but has 0 image"),
    ],
)
def test_what_the_model_cannot_read(tokenizer: PreTrainedTokenizerBase, message: dict, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        processor(tokenizer, TEMPLATES[0]).apply_chat_template([message, {"role": "user", "content": "x"}])


@pytest.mark.parametrize("given", [{"tools": [{"type": "function"}]}, {"documents": [{"title": "a", "text": "b"}]}])
def test_tools_and_documents_are_not_left_out_silently(tokenizer: PreTrainedTokenizerBase, given: dict) -> None:
    ours, question = processor(tokenizer, TEMPLATES[0]), [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError, match="tools and documents: the model was trained with images and text alone"):
        ours.apply_chat_template(question, **given)
    assert ours.apply_chat_template(question, **{name: [] for name in given}) == ours.apply_chat_template(question)


def test_it_is_saved_and_can_be_replaced(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ours = processor(tokenizer, TEMPLATES[0])
    ours.save_pretrained(tmp_path)
    assert TinyGPTVProcessor.from_pretrained(tmp_path).chat_template == ours.chat_template
    own = TinyGPTVProcessor(tokenizer, chat_template="{{ messages[0].content }}!")
    assert own.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


class _Images(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/image.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(tiny.encoded_images(1)[0] if found else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Images) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_paths_and_base64(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, url: str) -> None:
    """In every form in which messages of transformers and OpenAI give an image."""
    image = tiny.encoded_images(1)[0]
    (tmp_path / "image.png").write_bytes(image)
    encoded = base64.b64encode(image).decode()
    forms = [
        {"type": "image", "path": str(tmp_path / "image.png")},
        {"type": "image", "base64": encoded},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
        {"type": "image", "url": f"{url}/image.png"},
        {"type": "image_url", "image_url": {"url": f"{url}/image.png"}},
    ]
    ours = processor(tokenizer, TEMPLATES[0])
    expected = ours.image_processor(image)["pixel_values"]
    for form in forms:
        messages = [{"role": "user", "content": [form, {"type": "text", "text": "what?"}]}]
        inputs = ours.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert inputs["pixel_values"].equal(expected), form
    with pytest.raises(DataError, match=r"none\.png cannot be fetched: .*404"):
        ours(text="<ImageHere>", images=f"{url}/none.png")
    with pytest.raises(DataError, match="No such file"):
        ours(text="<ImageHere>", images="nowhere.png")


def test_the_image_processor(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = processor(tokenizer, TEMPLATES[0])
    images = tiny.encoded_images(3)
    expected = torch.cat([ours.image_processor(image)["pixel_values"] for image in images])
    assert ours.image_processor([[images[0]], images[1:]], return_tensors="pt")["pixel_values"].equal(expected)
    assert ours.image_processor(expected)["pixel_values"].equal(expected)
    assert (ours.image_processor(images, return_tensors="np")["pixel_values"] == expected.numpy()).all()
    alone = ours(images=images)
    assert list(alone) == ["pixel_values"] and alone["pixel_values"].equal(expected)
    assert ours.image_processor.size == {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    for wrong in (
        {"size": {"shortest_edge": 28}},
        {"size": {"height": 28, "width": 42}},
        {"size": 0},
        {"do_normalize": True},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
            type(ours.image_processor)(**wrong)
