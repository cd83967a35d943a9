"""The demo's page: a picture, on which one can paint, beside a chat, and the answer's boxes drawn on the picture."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr
from PIL import Image

from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.infer.demo_pictures import examples
from tinygptv_ds.infer.drawing import colour, draw_regions
from tinygptv_ds.infer.grounding import Region, find_regions, pieces, with_painted_box
from tinygptv_ds.infer.settings import Generation

# What each button puts before, or instead of, the question: those of MiniGPT-v2's demo, and captions.
TASKS = {
    "Chat": "",
    "VQA": "[vqa] ",
    "Caption": "[caption] Briefly describe this image.",
    "Grounding": "[grounding] describe this image in detail",
    "Refer": "[refer] ",
    "Identify": "[identify] what is this ",
    "Detection": "[detection] ",
}
HINTS = {
    "Chat": "Ask anything about the picture.",
    "VQA": "A short answer to a question: [vqa] what colour is the bus?",
    "Caption": "One line about the whole picture.",
    "Grounding": "A description in which each thing is marked on the picture.",
    "Refer": "Where is it? Name a thing: [refer] the red bus",
    "Identify": "Paint over a thing in the picture, then send.",
    "Detection": "Every one of a kind: [detection] bus",
}
WAITING = 16  # questions in the queue; further ones are told to come back
_MOST_BYTES = "20mb"
_HOUR = 3600  # seconds after which temporary files go
# (field of Generation, least, most, step, label)
_SLIDERS = (
    ("temperature", 0, 2, 0.1, "Temperature (0: the likeliest word)"),
    ("top_p", 0.05, 1, 0.05, "Top p"),
    ("num_beams", 1, 10, 1, "Beams"),
    ("max_new_tokens", 1, 500, 1, "Most new tokens"),
    ("repetition_penalty", 1, 2, 0.05, "Repetition penalty"),
)
_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
_CSS = "main.fillable {max-width: 1280px !important} button[title=Share] {display: none}"


# (turns so far, question, picture or None, settings) -> the answer in pieces
Reply = Callable[[Sequence[tuple[str, str]], str, Image.Image | None, Generation], Iterator[str]]


@dataclass
class Talk:
    """One visitor's conversation about one picture."""

    picture: bytes = b""
    turns: list[tuple[str, str]] = field(default_factory=list)


def build_page(reply: Reply, name: str, defaults: Generation) -> gr.Blocks:
    """The page, not launched yet.

    Args:
        reply: answers; raises a TinyGPTVError for what cannot be asked.
        name: of the model.
        defaults: where the sliders stand at first.
    """
    samples = examples()
    with gr.Blocks(
        title=f"{name} - TinyGPT-V", analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, _HOUR)
    ) as page:
        gr.Markdown(f"## TinyGPT-V &nbsp;·&nbsp; {_escaped(name)}")
        talk = gr.State(Talk())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=480):
                picture = gr.ImageEditor(
                    type="pil",
                    label="Picture",
                    sources=("upload", "clipboard"),
                    brush=gr.Brush(default_size=10, colors=["rgb(230, 25, 75)"], color_mode="fixed"),
                    transforms=(),
                    layers=False,
                    height=440,
                    elem_id="picture",
                )
                settings = _sliders(defaults)
            with gr.Column(scale=7, min_width=480):
                chat = gr.Chatbot(
                    show_label=False,
                    height=440,
                    buttons=["copy"],
                    latex_delimiters=[],
                    feedback_options=None,
                    placeholder="Upload a picture, or take one of the examples below, and ask.",
                    elem_id="chat",
                )
                task = gr.Radio(list(TASKS), value="Chat", show_label=False, container=False, elem_id="task")
                words = gr.Textbox(
                    placeholder=HINTS["Chat"], show_label=False, container=False, autofocus=True, elem_id="words"
                )
                with gr.Row():
                    send = gr.Button("Send", min_width=80, variant="primary", elem_id="send")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    reset = gr.Button("Reset", min_width=80, elem_id="reset")
        offered = gr.Dataset(
            label="Examples",
            components=[gr.Image(visible=False, label="Picture"), gr.Textbox(visible=False, label="Question")],
            samples=samples,
            type="index",
        )
        task.input(lambda chosen: gr.Textbox(TASKS[chosen], placeholder=HINTS[chosen]), task, words, queue=False)
        # The editor keeps its picture when it is given another one, unless it is emptied first.
        offered.click(lambda: None, None, picture, show_progress="hidden").then(
            lambda number: samples[number], offered, [picture, words], show_progress="hidden"
        )
        given, shown = [words, picture, chat, talk, *settings], [words, chat, talk]
        asked = gr.on(
            [send.click, words.submit],
            _asking(reply, defaults),
            given,
            shown,
            concurrency_limit=1,
            concurrency_id="model",
        )
        stop.click(None, cancels=[asked], queue=False)
        gr.on([reset.click, picture.upload, picture.clear], lambda: ([], Talk()), None, [chat, talk], cancels=[asked])
    return page.queue(max_size=WAITING, api_open=False)


def launch(page: gr.Blocks, host: str, port: int, *, share: bool, wait: bool = True) -> str:
    """Serve the page and return its address; nothing on it comes from elsewhere.

    Args:
        page: from `build_page`.
        host: address to listen on.
        port: likewise.
        share: whether gradio opens a public address through its own servers.
        wait: until it is stopped; False returns at once.
    """
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        max_file_size=_MOST_BYTES,
        prevent_thread_lock=not wait,
        quiet=not wait,
    )
    return local


def _sliders(defaults: Generation) -> list[gr.Slider]:
    """One for each of `_SLIDERS`."""
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(least, most, getattr(defaults, name), step=step, label=label)
            for name, least, most, step, label in _SLIDERS
        ]


def _asking(reply: Reply, defaults: Generation) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What happens when a question is sent."""

    def ask(
        words: str, editor: dict[str, Any] | None, chat: list[Any], talk: Talk, *sliders: float
    ) -> Iterator[tuple[Any, ...]]:
        picture, mask = opened(editor)
        question = with_painted_box(words, mask).strip()
        if not question:
            raise gr.Error("There is no question.", print_exception=False)
        key = b"" if picture is None else picture.tobytes()
        if key != talk.picture:  # another picture is another conversation
            chat, talk = [], Talk(key)
        chat = [*chat, *_question(question, picture), _said("assistant", "")]
        names = [name for name, *_ in _SLIDERS]
        settings = replace(defaults, **dict(zip(names, sliders, strict=True)))
        answer = ""
        yield "", chat, talk
        try:
            for piece in reply(talk.turns, question, picture, settings):
                answer += piece
                chat[-1] = _said("assistant", _escaped(answer))
                yield "", chat, talk
        except TinyGPTVError as error:
            raise gr.Error(str(error), print_exception=False) from None
        talk.turns.append((question, answer))
        yield "", [*chat[:-1], *_answer(answer, picture)], talk

    return ask


def opened(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in RGB and the mask of what is painted on it, each None where there is none."""
    if editor is None or editor["background"] is None:
        return None, None
    masks = [layer.getchannel("A") for layer in editor["layers"] if layer.getbbox()]
    mask = Image.new("L", editor["background"].size)
    for painted in masks:
        mask.paste(255, mask=painted)
    return editor["background"].convert("RGB"), mask if masks else None


def _question(question: str, picture: Image.Image | None) -> list[dict[str, Any]]:
    """The question, and the box in it where it is to be identified."""
    said = [_said("user", _escaped(question))]
    regions = find_regions(question) if "[identify]" in question else []
    return said + ([_said("user", _drawn(picture, regions))] if picture and regions else [])


def _answer(answer: str, picture: Image.Image | None) -> list[dict[str, Any]]:
    """The answer with its phrases in the colours of their boxes, and these on the picture."""
    regions = find_regions(answer)
    text = "".join(
        _escaped(text) if number is None else f'<b style="color: rgb{colour(number)}">{_escaped(text)}</b>'
        for text, number in pieces(answer, regions)
    )
    said = [_said("assistant", text or "*(no answer)*")]
    return said + ([_said("assistant", _drawn(picture, regions))] if picture and regions else [])


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _drawn(picture: Image.Image, regions: list[Region]) -> gr.Image:
    return gr.Image(draw_regions(picture, regions), format="jpeg", buttons=["download", "fullscreen"], show_label=False)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _PUNCTUATION.sub(r"\\\1", text)
