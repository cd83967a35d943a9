"""The command `demo`: a page on which one talks with the model about an image."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinygptv_ds.apps.server_args import add_serving_arguments, check_serving_arguments, listen

if TYPE_CHECKING:
    from PIL import Image

    from tinygptv_ds.apps.demo.page import Reply
    from tinygptv_ds.generate.settings import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    add_serving_arguments(parser, 7860)
    parser.add_argument("--share", action="store_true", help="open a public address through gradio's servers")


def run(args: argparse.Namespace) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigError: an option is wrong, a package is missing, or the port is taken.
        WeightsError: there is no model.
    """
    defaults = check_serving_arguments(args, "gradio")
    channel = listen(args)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from tinygptv_ds.apps.demo.page import build_page, launch

    reply, name = replying(args)
    page = build_page(reply, name, defaults)
    channel.close()  # for gradio, which opens its own
    print(f"{name} at {' and '.join(launch(page, args.host, args.port, share=args.share))}", flush=True)
    page.block_thread()


def replying(args: argparse.Namespace) -> tuple[Reply, str]:
    """The model that the options name, as the page wants it, and its name."""
    from tinygptv_ds.generate.conversation import Turn
    from tinygptv_ds.generate.model_args import load_from

    answerer = load_from(args, show_prompts=args.show_prompt)

    def reply(
        turns: Sequence[tuple[str, str]], question: str, image: Image.Image | None, generation: Generation
    ) -> Iterator[str]:
        images = [] if image is None else [image]
        asked = [Turn(said, answer=answer) for said, answer in turns] + [Turn(question)]
        asked[0] = Turn(asked[0].question, images, asked[0].answer)
        yield from answerer.stream(answerer.prompt(asked), generation)

    return reply, answerer.name
