"""Conversations and prompts: questions with images go in, prompts for `generate.py` come out. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tinygptv_ds.processing.templates import Template
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, split_plain_text

if TYPE_CHECKING:
    from torch import Tensor

    from tinygptv_ds.processing.processor import ImageInput

    PromptImage: TypeAlias = ImageInput | Tensor  # a tensor: cached features `[queries, width]` of the Q-Former


@dataclass(frozen=True)
class Prompt:
    """A text with images for the model to continue, and what ends the answer.

    Attributes:
        parts: texts with `<ImageHere>` for each image; each is tokenized separately.
        images: one image for each `<ImageHere>`, in order: all as cached features, or none.
        add_bos_token: whether it starts with the BOS token.
        stop: texts that end the answer; without any, only the end token does.
    """

    parts: tuple[str, ...]
    images: tuple[PromptImage, ...] = ()
    add_bos_token: bool = False
    stop: tuple[str, ...] = ("###",)

    @property
    def text(self) -> str:
        """All parts joined, as they are shown."""
        return "".join(split_plain_text("".join(self.parts)))


@dataclass(frozen=True)
class Turn:
    """A question with its images, and its answer unless that is to be generated."""

    question: str
    images: Sequence[PromptImage] = ()
    answer: str | None = None


@dataclass
class Conversation:
    """A conversation with images, in which each question gives the next prompt.

    Attributes:
        template: the words around questions and answers.
        turns: (question with its image tags, answer); the last answer is None until it is added.
        images: the images of all questions, in order.
    """

    template: Template
    turns: list[tuple[str, str | None]] = field(default_factory=list)
    images: list[PromptImage] = field(default_factory=list)

    def ask(self, question: str, images: Sequence[PromptImage] = ()) -> Prompt:
        """Return the prompt for the answer to the next question, which comes after its `images`.

        A previous question that was not answered is removed first.

        Raises:
            DataError: the question holds another number of `<ImageHere>` than images.
        """
        self.add_question(question, images)
        return self.prompt()

    def add_question(self, question: str, images: Sequence[PromptImage] = ()) -> None:
        """Add a question with its images; a previous one that was not answered is removed first.

        Raises:
            DataError: the question holds another number of `<ImageHere>` than images.
        """
        self.remove_unanswered()
        placed = self.template.place_images(question, len(images), later=bool(self.images))
        self.turns.append((placed, None))
        self.images.extend(images)

    def prompt(self) -> Prompt:
        """Return the prompt for the answer to the last question."""
        template = self.template
        return Prompt(template.parts(self.turns), tuple(self.images), template.add_bos_token, template.stop)

    def add_answer(self, answer: str) -> None:
        """Add the answer to the history; an image placeholder that the model may have written places nothing."""
        question, _ = self.turns[-1]
        typed = self.template.as_typed(answer)
        self.turns[-1] = (question, typed.replace(IMAGE_PLACEHOLDER, ""))

    def remove_unanswered(self) -> None:
        """Remove the last question with its images, if it was not answered."""
        if self.turns and self.turns[-1][1] is None:
            question, _ = self.turns.pop()
            count = question.count(IMAGE_PLACEHOLDER)
            del self.images[len(self.images) - count :]


def prompt_of(template: Template, turns: Sequence[Turn]) -> Prompt:
    """Return the prompt for the answer to the last of `turns`, of which all others have an answer.

    Raises:
        DataError: a question holds another number of `<ImageHere>` than images.
    """
    conversation = Conversation(template)
    for turn in turns[:-1]:
        conversation.add_question(turn.question, turn.images)  # building a prompt for each turn takes quadratic time
        conversation.add_answer(turn.answer or "")
    return conversation.ask(turns[-1].question, turns[-1].images)
