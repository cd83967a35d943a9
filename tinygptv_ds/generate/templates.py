"""How questions are put to the model: the templates of the original and of the training. No torch.

A prompt is a list of parts. Those of a training template are tokenised each by itself, as the training did; the
original tokenises its conversations as one text between images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tinygptv_ds.config.evaluation_section import is_template
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@dataclass(frozen=True)
class Prompt:
    """What is put to the model, its images apart.

    Attributes:
        parts: texts with `<ImageHere>` for each image, each tokenised by itself.
        add_bos_token: whether the BOS token stands in front.
        stop: texts that end the answer.
    """

    parts: tuple[str, ...]
    add_bos_token: bool = False
    stop: tuple[str, ...] = ("###",)

    @property
    def text(self) -> str:
        """All parts in one."""
        return "".join(self.parts)


@dataclass(frozen=True)
class Template:
    """The words around questions and answers.

    Attributes:
        name: for messages.
        question: around a question, with `{}` for it.
        system: in front of the whole, followed by `before`; a system message takes its place.
        before: in front of the first question.
        after_answer: behind each answer of the history.
        add_bos_token: whether the BOS token stands in front.
        stop: texts that end an answer.
        padded: a question next to images has a space behind it, as in training.
        in_parts: every question and answer is tokenised by itself, as in training.
    """

    name: str
    question: str
    system: str = ""
    before: str = ""
    after_answer: str = ""
    add_bos_token: bool = False
    stop: tuple[str, ...] = ("###",)
    padded: bool = False
    in_parts: bool = False

    def prompt(self, turns: Sequence[tuple[str, str | None]]) -> Prompt:
        """The prompt of a conversation of (question, answer) whose last answer is wanted, or None.

        Questions hold their `<ImageHere>`, see `with_images`.
        """
        opening = self.system + self.before
        parts = [opening] if opening else []
        for number, (question, answer) in enumerate(turns):
            parts.append(self.question.replace("{}", question, 1))
            if number + 1 < len(turns):
                parts.append(f"{answer}{self.after_answer}")
        return Prompt(tuple(parts) if self.in_parts else ("".join(parts),), self.add_bos_token, self.stop)

    def with_images(self, question: str, images: int, *, adjacent: bool = False) -> str:
        """A question behind its images, unless it places them itself by `<ImageHere>`.

        Args:
            question: its words.
            images: how many come with it.
            next to: whether the conversation has images already.

        Raises:
            DataError: it holds another number of `<ImageHere>`.
        """
        placed = question.count(IMAGE_PLACEHOLDER)
        if placed not in (0, images):
            raise DataError(
                f"the question holds {placed} times {IMAGE_PLACEHOLDER}, but comes with {images} image(s); leave "
                "it out, or write it once per image"
            )
        if placed:
            return question
        padding = " " if self.padded and (images or adjacent) else ""
        return f"{IMAGE_TAG * images} {question}{padding}" if images else question + padding


TEMPLATES = {
    "A": Template("A", "Human: {}###Assistant: ", system=_SYSTEM, before="###", after_answer="###"),
    "B": Template("B", "<s>[INST] {} [/INST]"),
    "C": Template("C", "Human: {}###Assistant: ", before="###", after_answer="###"),
}
TRAINING = "training"


def training_template(question: str | None, end_sym: str) -> Template:
    """As in training: `question` is the recipe's `text.prompt_template` (None: no wrap), `end_sym` its end symbol."""
    return Template(
        TRAINING,
        "{}" if question is None else question,
        after_answer=end_sym,
        add_bos_token=True,
        stop=(end_sym,),
        padded=True,
        in_parts=True,
    )


def choose_template(wanted: str | None, trained: str | None, end_sym: str) -> Template:
    """The template that is asked for, or the one that the checkpoint calls for.

    Args:
        wanted: "A", "B", "C", "training", a text with `{}` for the question (used like the training's), or None: the
            training's own, and where that wrapped nothing (stages 1 and 2, on bare captions) A, as in the original's
            demo.
        trained: the checkpoint's `prompt_template`.
        end_sym: the checkpoint's; ends an answer in every template.

    Raises:
        ConfigError: no such template.
    """
    if wanted is None:
        wanted = "A" if trained is None else TRAINING
    check_template(wanted)
    if wanted == TRAINING:
        return training_template(trained, end_sym)
    chosen = TEMPLATES.get(wanted) or replace(training_template(wanted, end_sym), name="own")
    return replace(chosen, stop=tuple(dict.fromkeys((*chosen.stop, end_sym))))


def check_template(wanted: str | None) -> None:
    """See that `choose_template` will know it.

    Raises:
        ConfigError: it will not.
    """
    if is_template(wanted, (TRAINING, *TEMPLATES)):
        return
    raise ConfigError(
        f"--template {wanted!r}: give {', '.join(TEMPLATES)}, {TRAINING}, or a text with {{}} once, for the question"
    )


@dataclass
class Conversation:
    """A conversation with images: questions go in, prompts come out, answers are written back.

    Attributes:
        template: the words around them.
        turns: (question with its image tags, answer); the last answer is None while it is awaited.
        images: all of them, in the order of their places.
    """

    template: Template
    turns: list[tuple[str, str | None]] = field(default_factory=list)
    images: list = field(default_factory=list)

    def ask(self, question: str, images: Sequence = ()) -> Prompt:
        """Put the next question, behind `images`; the prompt goes to the model with `self.images`.

        A question that was not answered is taken back first.

        Raises:
            DataError: the question holds another number of `<ImageHere>` than images.
        """
        self.take_back()
        worded = self.template.with_images(question, len(images), adjacent=bool(self.images))
        self.turns.append((worded, None))
        self.images.extend(images)
        return self.template.prompt(self.turns)

    def answered(self, answer: str) -> None:
        """Write the answer back; later prompts hold it, without placeholders that it might have made up."""
        question, _ = self.turns[-1]
        self.turns[-1] = (question, answer.replace(IMAGE_PLACEHOLDER, ""))

    def take_back(self) -> None:
        """Forget a question that was not answered, with its images."""
        if self.turns and self.turns[-1][1] is None:
            question, _ = self.turns.pop()
            count = question.count(IMAGE_PLACEHOLDER)
            del self.images[len(self.images) - count :]
