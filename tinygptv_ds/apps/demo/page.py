"""The demo's page: an image that visitors can paint on, next to a chat that shows the boxes of an answer on it."""

from __future__ import annotations

import hashlib
import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gradio as gr
from gradio import utils
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from tinygptv_ds.apps.demo.disconnects import hide_disconnects
from tinygptv_ds.apps.demo.drawing import color, draw_regions
from tinygptv_ds.apps.demo.example_images import Example, examples
from tinygptv_ds.apps.demo.grounding import Region, find_regions, text_spans, with_painted_box
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.processing.image import WHITE, Color, open_image

# The text that each button puts before, or instead of, the question: as in MiniGPT-v2's demo, and for captions.
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
MAX_QUEUED = 16  # questions that wait; further ones are refused with a message
# The least time between two states of a growing answer. A browser that redraws at every token lets no click through:
# Stop and Reset would wait until the answer ends.
_REDRAW_SECONDS = 0.1
_MAX_FILE_SIZE = "20mb"
_HOUR = 3600  # seconds after which temporary files are deleted
# (field of Generation, minimum, maximum, step, label)
_SLIDERS = (
    ("temperature", 0, 2, 0.1, "Temperature (0: the most probable token)"),
    ("top_p", 0.05, 1, 0.05, "Top p"),
    ("num_beams", 1, 10, 1, "Beams"),
    ("max_new_tokens", 1, 500, 1, "Maximum new tokens"),
    ("repetition_penalty", 1, 2, 0.05, "Repetition penalty"),
)
_CSS = """
main.fillable {max-width: 1280px !important}
button[title=Share] {display: none}
#chat .image-container img {max-height: 300px; width: auto}
#task label {padding: 5px 9px}
/* On a phone everything is in one column: image, chat, question, then settings and examples. */
@media (max-width: 1000px) {
  #columns {flex-direction: column; flex-wrap: nowrap}
  #columns > .column {display: contents}
  #image {order: 1} #task {order: 2} #question {order: 3} #buttons {order: 4} #chat {order: 5}
  #examples {order: 6} #sampling {order: 7}
}
@media (max-width: 600px) {
  main.fillable {padding: 8px !important}
  #image {height: 340px !important; min-height: 0 !important}
  #chat {height: 320px !important}
  #task .wrap {flex-wrap: nowrap; overflow-x: auto}
}
"""


# (earlier turns, question, image or None, settings) -> the answer in pieces
AnswerFunction = Callable[[Sequence[tuple[str, str]], str, Image.Image | None, Generation], Iterator[str]]


@dataclass
class ImageConversation:
    """One visitor's conversation about one image.

    Attributes:
        image_hash: from `_hash`; empty without an image.
        turns: questions and their answers.
    """

    image_hash: bytes = b""
    turns: list[tuple[str, str]] = field(default_factory=list)


def build_page(
    answer_question: AnswerFunction,
    name: str,
    defaults: Generation,
    background: Color | None = WHITE,
    samples: Sequence[Example] | None = None,
) -> gr.Blocks:
    """Build the page without launching it.

    Args:
        answer_question: generates the answers; it raises a TinyGPTVError for a question that cannot be answered.
        name: the model's name.
        defaults: the sliders' first values.
        background: how images are read, see processing/image.py.
        samples: examples; None: those for the last stage.
    """
    samples = examples() if samples is None else samples
    title = f"{name} - TinyGPT-V"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, _HOUR)) as page:
        gr.HTML(f"<h2>TinyGPT-V &nbsp;·&nbsp; {html.escape(name)}</h2>")
        conversation = gr.State(ImageConversation())
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=5, min_width=480):
                image = _editor()
                sliders = _sliders(defaults)
                example_table = _example_table(samples)
            with gr.Column(scale=7, min_width=480):
                chat = _chat()
                task = gr.Radio(list(TASKS), value="Chat", show_label=False, container=False, elem_id="task")
                question = gr.Textbox(
                    placeholder=HINTS["Chat"], show_label=False, container=False, autofocus=True, elem_id="question"
                )
                with gr.Row(elem_id="buttons"):
                    send = gr.Button("Send", min_width=80, variant="primary", elem_id="send")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    reset = gr.Button("Reset", min_width=80, elem_id="reset")

        task.input(lambda chosen: gr.Textbox(TASKS[chosen], placeholder=HINTS[chosen]), task, question, queue=False)
        # The editor keeps its image when it is given another one, unless it is emptied first.
        example_table.click(lambda: None, None, image, show_progress="hidden").then(
            lambda number: (*samples[number], [], ImageConversation()),
            example_table,
            [image, question, chat, conversation],
            show_progress="hidden",
        )
        asked = gr.on(
            [send.click, question.submit],
            _ask_function(answer_question, defaults, background),
            [question, image, chat, conversation, *sliders],
            [question, chat, conversation],
            concurrency_limit=1,
            concurrency_id="model",
        )
        stop.click(None, cancels=[asked], queue=False)
        # End the answer first, then empty the chat: in the other order a late piece of the answer could undo it.
        ended = reset.click(None, cancels=[asked], queue=False)
        ended.then(lambda: ([], ImageConversation()), None, [chat, conversation], queue=False)
        image.upload(
            partial(_start_over_for_another_image, background),
            [image, conversation],
            [chat, conversation],
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return page.queue(max_size=MAX_QUEUED, api_open=False)


def launch(page: gr.Blocks, host: str, port: int, *, share: bool = False) -> list[str]:
    """Serve the page from threads and return its addresses; the page loads nothing from other servers.

    Args:
        page: from `build_page`.
        host: address to listen on.
        port: port to listen on.
        share: whether gradio also opens a public address through its own servers.
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
        max_file_size=_MAX_FILE_SIZE,
        prevent_thread_lock=True,
        quiet=True,
    )
    hide_disconnects()
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


def _example_table(samples: Sequence[Example]) -> gr.Dataset:
    """Make the table of examples; a click on one gives the number of its row."""
    columns = [gr.Image(visible=False, label="Image"), gr.Textbox(visible=False, label="Question")]
    return gr.Dataset(
        label="Examples", components=columns, samples=[*map(list, samples)], type="index", elem_id="examples"
    )


def _chat() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height=520,
        buttons=["copy"],
        render_markdown=False,  # questions and answers are shown literally
        feedback_options=None,
        placeholder="Upload an image, or take one of the examples, and ask.",
        elem_id="chat",
    )


def _sliders(defaults: Generation) -> list[gr.Slider]:
    """Make a slider for each of `_SLIDERS`."""
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        return [
            gr.Slider(minimum, maximum, getattr(defaults, name), step=step, label=label)
            for name, minimum, maximum, step, label in _SLIDERS
        ]


def _ask_function(
    answer_question: AnswerFunction, defaults: Generation, background: Color | None = None
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """Return the handler of a question that is sent; it yields new values of question, chat and conversation."""

    def ask(
        typed: str, editor: dict[str, Any] | None, chat: list[Any], conversation: ImageConversation, *sliders: float
    ) -> Iterator[tuple[Any, ...]]:
        image, mask = image_and_mask(editor, background)
        question = with_painted_box(typed, mask).strip()
        if not question:
            raise gr.Error("There is no question.", print_exception=False)
        if _hash(image) != conversation.image_hash:  # another image starts another conversation
            chat, conversation = [], ImageConversation(_hash(image))
        chat = [*chat, *_question_messages(question, image)]
        names = [name for name, *_ in _SLIDERS]
        chosen: dict[str, Any] = dict(zip(names, sliders, strict=True))
        settings = replace(defaults, **chosen)
        answer = ""
        yield "", [*chat, _message("assistant", "")], conversation
        drawn_at = time.monotonic()
        try:
            for piece in answer_question(conversation.turns, question, image, settings):
                answer += piece
                if time.monotonic() - drawn_at >= _REDRAW_SECONDS:
                    # The question stays as it is: the visitor may be typing the next one.
                    yield gr.skip(), [*chat, _message("assistant", answer)], gr.skip()
                    drawn_at = time.monotonic()
        except TinyGPTVError as error:
            raise gr.Error(str(error), print_exception=False) from None
        conversation.turns.append((question, answer))
        yield gr.skip(), [*chat, *_answer_messages(answer, image)], conversation

    return ask


def _start_over_for_another_image(
    background: Color | None, editor: dict[str, Any] | None, conversation: ImageConversation
) -> tuple[Any, Any]:
    """Empty the chat, unless it is about this image already: the upload event of an example's image comes late."""
    image, _ = image_and_mask(editor, background)
    if _hash(image) == conversation.image_hash:
        return gr.skip(), gr.skip()
    return [], ImageConversation(_hash(image))


def _hash(image: Image.Image | None) -> bytes:
    return b"" if image is None else hashlib.sha256(image.tobytes() + str(image.size).encode()).digest()


def image_and_mask(
    editor: dict[str, Any] | None, background: Color | None = None
) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the editor's image in RGB and the mask of its painted pixels, each None where there is none.

    `background` says how the image is read, see processing/image.py.
    """
    if editor is None or editor["background"] is None:
        return None, None
    painted_layers = [layer.getchannel("A") for layer in editor["layers"] if layer.getbbox()]
    mask = Image.new("L", editor["background"].size)
    for painted in painted_layers:
        mask.paste(255, mask=painted)
    return open_image(editor["background"], background=background), mask if painted_layers else None


def _question_messages(question: str, image: Image.Image | None) -> list[dict[str, Any]]:
    """Return the messages of a question: its text, and for [identify] its box drawn on the image."""
    messages = [_message("user", question)]
    regions = find_regions(question) if "[identify]" in question else []
    return messages + ([_message("user", _drawn_file(image, regions))] if image and regions else [])


def _answer_messages(answer: str, image: Image.Image | None) -> list[dict[str, Any]]:
    """Return the messages of an answer: its text, with phrases in the colors of their boxes, and the boxes drawn."""
    regions = find_regions(answer)
    if not regions or not image:
        return [_message("assistant", answer if answer.strip() else "(an empty answer)")]
    text = "".join(
        html.escape(text) if number is None else f'<b style="color: rgb{color(number)}">{html.escape(text)}</b>'
        for text, number in text_spans(answer, regions)
    )
    return [
        _message("assistant", gr.HTML(f'<span style="white-space: pre-wrap">{text}</span>')),
        _message("assistant", _drawn_file(image, regions)),
    ]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _drawn_file(image: Image.Image, regions: list[Region]) -> dict[str, str]:
    """Draw the regions into a file of gradio's upload folder, once; gradio would write a component's at every yield."""
    return {"path": save_pil_to_cache(draw_regions(image, regions), utils.get_upload_folder(), format="png")}
