"""The command `chat`: a conversation about images in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tinygptv_ds.apps.fetch_image import fetch_image, is_url
from tinygptv_ds.config.paths import expand_user
from tinygptv_ds.errors import DataError, TinyGPTVError
from tinygptv_ds.files import cache_home
from tinygptv_ds.generate.conversation import Conversation, Prompt
from tinygptv_ds.generate.model_args import add_model_arguments, check_model_arguments, load_from
from tinygptv_ds.generate.settings import Generation, add_generation_arguments, generation_from

if TYPE_CHECKING:
    from PIL import Image

    from tinygptv_ds.generate.answerer import Answerer
    from tinygptv_ds.processing.image import Color

_HELP = """\
/image PATH|URL   an image for the next question; further ones may follow
/reset            forget the conversation and its images
/prompt           the exact text of the last prompt, and its length
/help             this list
/quit             leave (or Ctrl-D; Ctrl-C ends an answer)
Anything else is a question. Task names come first: [vqa] [caption] [refer] [identify] [grounding] [detection]"""
_HISTORY_LINES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    parser.epilog = "Questions may also be piped in, one a line, with the same commands (/help)."
    add_model_arguments(parser)
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH|URL", help="an image to begin with (repeatable)"
    )
    parser.add_argument("--allow-private", action="store_true", help="also fetch images from private addresses")
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model, then answer questions until the input ends."""
    check_model_arguments(args)
    generation = generation_from(args)
    from tinygptv_ds.processing.image import parse_background

    background = parse_background(args.background)
    images = [load_image(source, args.allow_private, background) for source in args.image]
    answerer = load_from(args)
    model, template = answerer.model, answerer.template
    dtype = str(model.dtype).removeprefix("torch.")
    about = f"{args.bits} bit, {dtype}" if args.bits < 16 else dtype
    print(f"{args.model}: {about} on {model.device}, template {template.name}; /help", file=sys.stderr, flush=True)
    chat = Chat(
        answerer,
        Conversation(template),
        generation,
        args.show_prompt,
        args.allow_private,
        images,
        background=background,
    )
    for line in _typed_lines() if sys.stdin.isatty() else sys.stdin:
        if not chat.take(line):
            return


def load_image(source: str, allow_private: bool = False, background: Color | None = None) -> Image.Image:
    """Read an image by path or URL, decoded to RGB; `background` as in processing/image.py.

    Raises:
        DataError: there is no such file, or it is not an image; names it.
    """
    from tinygptv_ds.processing.image import open_image

    if is_url(source):
        encoded = fetch_image(source, allow_private=allow_private)
        try:
            return open_image(encoded, background=background)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
    path = expand_user(source)
    if not os.path.isfile(path):  # noqa: PTH113 - False, where Path's own raises, for a name that is too long
        raise DataError(f"{source}: no such image; correct the path")
    return open_image(path, background=background)


@dataclass
class Chat:
    """One conversation with a model.

    Attributes:
        answerer: the model with its template.
        conversation: the questions and answers so far.
        generation: settings of generation.
        show_prompt: whether to print each prompt before its answer.
        allow_private: whether images may be fetched from private addresses.
        next_images: images for the next question.
        prompt: the last prompt.
        background: how images are read, see processing/image.py.
    """

    answerer: Answerer
    conversation: Conversation
    generation: Generation
    show_prompt: bool = False
    allow_private: bool = False
    next_images: list[Image.Image] = field(default_factory=list)
    prompt: Prompt | None = None
    background: Color | None = None

    def take(self, line: str) -> bool:
        """Run a command or answer a question; return False if the user wants to leave."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[], object]] = {
            "/image": lambda: self._add_image(rest.strip()),
            "/reset": self._reset,
            "/prompt": self._print_prompt,
            "/help": lambda: print(_HELP),
        }
        try:
            if word in ("/quit", "/exit"):
                return False
            if word in commands:
                commands[word]()
            elif line.startswith("/"):
                raise DataError(f"no command {word}; /help lists them")
            elif line:
                self._answer(line)
        except KeyboardInterrupt:  # before the first token: the question is removed
            print()
        except TinyGPTVError as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        return True

    def _add_image(self, source: str) -> None:
        if not source:
            raise DataError("/image needs a path or a URL")
        image = load_image(source, self.allow_private, self.background)
        self.next_images.append(image)
        print(f"({source}: {image.width} x {image.height} pixels, for the next question)")

    def _reset(self) -> None:
        self.conversation = Conversation(self.conversation.template)
        self.next_images, self.prompt = [], None
        print("(a new conversation)")

    def _print_prompt(self) -> None:
        if self.prompt is None:
            raise DataError("nothing has been asked yet")
        print(self.answerer.describe(self.prompt))

    def _answer(self, question: str) -> None:
        conversation = self.conversation
        self.prompt = conversation.ask(question, self.next_images)
        if self.show_prompt:
            self._print_prompt()
        seed = self.generation.seed  # each turn has its own: with the same one, all turns would draw alike
        turns = len(conversation.turns)
        settings = self.generation if seed is None else replace(self.generation, seed=seed + turns - 1)
        try:
            answer = self.answerer.stream(self.prompt, settings)
        except BaseException:
            conversation.remove_unanswered()
            raise
        self.next_images = []
        text = ""
        with contextlib.suppress(KeyboardInterrupt):  # the text so far is the answer then
            for piece in answer:
                text += piece
                print(piece, end="", flush=True)
        print()
        conversation.add_answer(text)


def _typed_lines() -> Iterator[str]:
    """Yield lines typed at a terminal, with editing and the history of earlier sessions if Python has readline."""
    readline = importlib.import_module("readline") if importlib.util.find_spec("readline") else None
    history = cache_home() / "chat_history"
    if readline is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(_HISTORY_LINES)
    try:
        while True:
            yield input("> ")
    except EOFError:
        print()
    finally:
        if readline is not None:
            with contextlib.suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(history)
