"""The demo's page: an image, on which one can paint, next to a chat, and the answer's boxes drawn on the image."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr
from gradio import utils
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from tinygptv_ds.apps.demo.drawing import colour, draw_regions
from tinygptv_ds.apps.demo.example_images import examples
from tinygptv_ds.apps.demo.grounding import Region, find_regions, pieces, with_painted_box
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.generate.settings import Generation

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
    "Chat": "Ask anything about the image.",
    "VQA": "A short answer to a question: [vqa] what colour is the bus?",
    "Caption": "One line about the whole image.",
    "Grounding": "A description in which each thing is marked on the image.",
    "Refer": "Where is it? Name a thing: [refer] the red bus",
    "Identify": "Paint over a thing in the image, then send.",
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
_CSS = """
main.fillable {max-width: 1280px !important}
button[title=Share] {display: none}
#chat .image-container img {max-height: 300px; width: auto}
#task label {padding: 5px 9px}
"""


# (turns so far, question, image or None, settings) -> the answer in pieces
Reply = Callable[[Sequence[tuple[str, str]], str, Image.Image | None, Generation], Iterator[str]]


@dataclass
class Talk:
    """One visitor's conversation about one image, which is known by its hash."""

    image: bytes = b""
    turns: list[tuple[str, str]] = field(default_factory=list)


def build_page(reply: Reply, name: str, defaults: Generation) -> gr.Blocks:
    """The page, not launched yet.

    Args:
        reply: answers; raises a TinyGPTVError for what cannot be asked.
        name: of the model.
        defaults: where the sliders stand at first.
    """
    title = f"{name} - TinyGPT-V"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, _HOUR)) as page:
        gr.HTML(f"<h2>TinyGPT-V &nbsp;·&nbsp; {html.escape(name)}</h2>")
        talk = gr.State(Talk())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=480):
                image = _editor()
                settings = _sliders(defaults)
                samples = examples()
                offered = _table(samples)
            with gr.Column(scale=7, min_width=480):
                chat = _chat()
                task = gr.Radio(list(TASKS), value="Chat", show_label=False, container=False, elem_id="task")
                words = gr.Textbox(
                    placeholder=HINTS["Chat"], show_label=False, container=False, autofocus=True, elem_id="words"
                )
                with gr.Row():
                    send = gr.Button("Send", min_width=80, variant="primary", elem_id="send")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    reset = gr.Button("Reset", min_width=80, elem_id="reset")

        task.input(lambda chosen: gr.Textbox(TASKS[chosen], placeholder=HINTS[chosen]), task, words, queue=False)
        # The editor keeps its image when it is given another one, unless it is emptied first.
        offered.click(lambda: None, None, image, show_progress="hidden").then(
            lambda number: (*samples[number], [], Talk()),
            offered,
            [image, words, chat, talk],
            show_progress="hidden",
        )
        given, shown = [words, image, chat, talk, *settings], [words, chat, talk]
        asked = gr.on(
            [send.click, words.submit],
            _asking(reply, defaults),
            given,
            shown,
            concurrency_limit=1,
            concurrency_id="model",
        )
        stop.click(None, cancels=[asked], queue=False)
        # First an end, then the emptying: the other way round a late piece of the answer could undo it.
        ended = reset.click(None, cancels=[asked], queue=False)
        ended.then(lambda: ([], Talk()), None, [chat, talk], queue=False)
        image.upload(_another_image, [image, talk], [chat, talk], show_progress="hidden", trigger_mode="always_last")
    return page.queue(max_size=WAITING, api_open=False)


def launch(page: gr.Blocks, host: str, port: int, *, share: bool = False) -> list[str]:
    """Serve the page from threads, and return its addresses; nothing on it comes from elsewhere.

    Args:
        page: from `build_page`.
        host: address to listen on.
        port: likewise.
        share: whether gradio opens a public address, too, through its own servers.
    """
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=_CSS,
        footer_links=[],
        run_history=False,
        max_file_size=_MOST_BYTES,
        prevent_thread_lock=True,
        quiet=True,
    )
    return [address for address in (local, public) if address]


def _editor() -> gr.ImageEditor:
    return gr.ImageEditor(
        type="pil",
        format="png",
        label="Image",
        sources=("upload", "clipboard"),
        brush=gr.Brush(default_size=10, colors=["rgb(230, 25, 75)"], color_mode="fixed"),
        transforms=(),
        layers=False,
        height=440,
        elem_id="image",
    )


def _table(samples: list[tuple[Image.Image, str]]) -> gr.Dataset:
    """The examples; a click gives the number of a row."""
    columns = [gr.Image(visible=False, label="Image"), gr.Textbox(visible=False, label="Question")]
    return gr.Dataset(label="Examples", components=columns, samples=samples, type="index", elem_id="examples")


def _chat() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height=520,
        buttons=["copy"],
        render_markdown=False,  # what people and models say is shown as it is
        feedback_options=None,
        placeholder="Upload an image, or take one of the examples, and ask.",
        elem_id="chat",
    )


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
        image, mask = opened(editor)
        question = with_painted_box(words, mask).strip()
        if not question:
            raise gr.Error("There is no question.", print_exception=False)
        if _key(image) != talk.image:  # another image is another conversation
            chat, talk = [], Talk(_key(image))
        chat = [*chat, *_question(question, image), _said("assistant", "")]
        names = [name for name, *_ in _SLIDERS]
        settings = replace(defaults, **dict(zip(names, sliders, strict=True)))
        answer = ""
        yield "", chat, talk
        try:
            for piece in reply(talk.turns, question, image, settings):
                answer += piece
                chat[-1] = _said("assistant", answer)
                yield "", chat, talk
        except TinyGPTVError as error:
            raise gr.Error(str(error), print_exception=False) from None
        talk.turns.append((question, answer))
        yield "", [*chat[:-1], *_answer(answer, image)], talk

    return ask


def _another_image(editor: dict[str, Any] | None, talk: Talk) -> tuple[Any, Any]:
    """An empty conversation, unless it is about this image: an example's counts as uploaded a moment late."""
    image, _ = opened(editor)
    return (gr.skip(), gr.skip()) if _key(image) == talk.image else ([], Talk(_key(image)))


def _key(image: Image.Image | None) -> bytes:
    return b"" if image is None else hashlib.sha256(image.tobytes() + str(image.size).encode()).digest()


def opened(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The image in RGB and the mask of what is painted on it, each None where there is none."""
    if editor is None or editor["background"] is None:
        return None, None
    masks = [layer.getchannel("A") for layer in editor["layers"] if layer.getbbox()]
    mask = Image.new("L", editor["background"].size)
    for painted in masks:
        mask.paste(255, mask=painted)
    return editor["background"].convert("RGB"), mask if masks else None


def _question(question: str, image: Image.Image | None) -> list[dict[str, Any]]:
    """The question, and the box in it where it is to be identified."""
    said = [_said("user", question)]
    regions = find_regions(question) if "[identify]" in question else []
    return said + ([_said("user", _drawn(image, regions))] if image and regions else [])


def _answer(answer: str, image: Image.Image | None) -> list[dict[str, Any]]:
    """The answer with its phrases in the colours of their boxes, and these on the image."""
    regions = find_regions(answer)
    if not regions or not image:
        return [_said("assistant", answer or "(no answer)")]
    text = "".join(
        html.escape(text) if number is None else f'<b style="color: rgb{colour(number)}">{html.escape(text)}</b>'
        for text, number in pieces(answer, regions)
    )
    return [
        _said("assistant", gr.HTML(f'<span style="white-space: pre-wrap">{text}</span>')),
        _said("assistant", _drawn(image, regions)),
    ]


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _drawn(image: Image.Image, regions: list[Region]) -> dict[str, str]:
    """A file in gradio's folder for such, written once; gradio would write a component's image at every piece."""
    return {"path": save_pil_to_cache(draw_regions(image, regions), utils.get_upload_folder(), format="png")}
