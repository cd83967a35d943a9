"""The command `demo`: a web page to chat with the model about an image."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinygptv_ds.apps.server_args import add_serving_arguments, check_serving_arguments, listen

if TYPE_CHECKING:
    from PIL import Image

    from tinygptv_ds.apps.demo.example_images import Example
    from tinygptv_ds.apps.demo.page import AnswerFunction
    from tinygptv_ds.generate.settings import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    add_serving_arguments(parser, 7860)
    parser.add_argument("--share", action="store_true", help="open a public address through gradio's servers")


def run(args: argparse.Namespace) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigError: an option is wrong, a package is missing, or the port is taken.
        WeightsError: there is no such model.
    """
    defaults = check_serving_arguments(args, "gradio")
    address = listen(args)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from tinygptv_ds.apps.demo.page import build_page, launch
    from tinygptv_ds.processing.image import parse_background

    answer_question, name, samples = load_answer_function(args)
    page = build_page(answer_question, name, defaults, parse_background(args.background), samples)
    address.close()  # gradio opens a socket of its own
    print(f"{name} at {' and '.join(launch(page, args.host, args.port, share=args.share))}", flush=True)
    page.block_thread()


def load_answer_function(args: argparse.Namespace) -> tuple[AnswerFunction, str, list[Example]]:
    """Load the model that the options name.

    Returns:
        The function that answers the page's questions, the model's name, and examples for it.
    """
    from tinygptv_ds.apps.demo.example_images import examples
    from tinygptv_ds.generate.conversation import Turn
    from tinygptv_ds.generate.model_args import load_from

    answerer = load_from(args, show_prompts=args.show_prompt)

    def answer_question(
        turns: Sequence[tuple[str, str]], question: str, image: Image.Image | None, generation: Generation
    ) -> Iterator[str]:
        images = [] if image is None else [image]
        first, *rest = [*turns, (question, None)]
        conversation = [Turn(first[0], images, first[1]), *(Turn(asked, answer=answer) for asked, answer in rest)]
        yield from answerer.stream(answerer.prompt(conversation), generation)

    image_size = answerer.model.config.vision_config.image_size
    return answer_question, answerer.name, examples(answerer.template.question, image_size)
