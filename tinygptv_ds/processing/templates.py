"""Question templates: the words around questions and answers in the original's demos and benchmarks and in training.

This is the only table of templates; every command, benchmark and training run takes its prompts from here. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinygptv_ds.config.template_names import BENCHMARK, TRAINING, check_template
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG, as_plain_text

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@dataclass(frozen=True)
class Template:
    """The words around the questions and answers of a conversation.

    Attributes:
        name: for messages.
        question: the words around a question, with `{}` for it.
        system: the words before the whole conversation, followed by `before`; a system message replaces them.
        before: the words before the first question.
        after_answer: the words after each answer of the history.
        add_bos_token: whether the prompt starts with the BOS token.
        stop: texts that end an answer.
        padded: whether a question of a conversation with images has a space after it, as in training.
        plain: texts without a meaning in questions, answers of the history and system messages: `<ImageHere>` and
            special tokens such as `<|endoftext|>`. Those that are not listed place images, or become tokens.
        in_parts: whether every question and answer is tokenized separately, as in training; the original tokenizes its
            conversations as one text between images.
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
    plain: tuple[str, ...] = ()

    @property
    def text(self) -> str | None:
        """The whole template of a single question, with `{}` for the question; None if it adds nothing."""
        whole = self.system + self.before + self.question
        return None if whole == "{}" else whole

    def with_system(self, message: str) -> Template:
        """Return the template with a system message in place of its own.

        Raises:
            DataError: the template has no system message.
        """
        if not self.system:
            raise DataError(f"template {self.name} has no place for a system message; write it in the first question")
        return replace(self, system=self.as_typed(message))

    def as_typed(self, text: str) -> str:
        """Return a text that a user typed or the model wrote, in which nothing of `plain` has a meaning.

        Raises:
            DataError: it holds half a character.
        """
        return as_plain_text(text, self.plain) if self.plain else text

    def parts(self, turns: Sequence[tuple[str, str | None]]) -> tuple[str, ...]:
        """Return the texts of a prompt, each of which is tokenized separately.

        Args:
            turns: (question, answer); the questions hold their image tags, see `place_images`, and the last answer,
                which is to be generated, is ignored.
        """
        opening = self.system + self.before
        parts = [opening] if opening else []
        for number, (question, answer) in enumerate(turns):
            parts.append(self.question.replace("{}", question, 1))
            if number + 1 < len(turns):
                parts.append(f"{answer}{self.after_answer}")
        return tuple(parts) if self.in_parts else ("".join(parts),)

    def place_images(self, question: str, images: int, *, later: bool = False) -> str:
        """Put image tags before a question, unless it places its images itself by `<ImageHere>`.

        Args:
            question: its words.
            images: the number of its images.
            later: whether an earlier turn of the conversation has images.

        Raises:
            DataError: the question holds another number of `<ImageHere>`.
        """
        question = self.as_typed(question)
        placed = question.count(IMAGE_PLACEHOLDER)
        if placed not in (0, images):
            raise DataError(
                f"the question holds {placed} times {IMAGE_PLACEHOLDER}, but comes with {images} image(s); leave "
                "it out, or write it once per image"
            )
        if placed:
            return question
        padding = " " if self.padded and (images or later) else ""
        return f"{IMAGE_TAG * images} {question}{padding}" if images else question + padding


TEMPLATES = {
    "A": Template("A", "Human: {}###Assistant: ", system=_SYSTEM, before="###", after_answer="###"),
    "B": Template("B", "<s>[INST] {} [/INST]"),
    "C": Template("C", "Human: {}###Assistant: ", before="###", after_answer="###"),
}
PUBLISHED = TEMPLATES["C"]  # of the published script of every benchmark except IconQA
ICONQA = Template("IconQA", "Human: {} ###Assistant: ", before="###")  # with a space before the second `###`


def training_template(question: str | None, end_sym: str) -> Template:
    """Return the template of training.

    Args:
        question: `text.prompt_template` of the recipe; None: nothing around the question.
        end_sym: the end symbol of the recipe.
    """
    return Template(
        TRAINING,
        "{}" if question is None else question,
        after_answer=end_sym,
        add_bos_token=True,
        stop=(end_sym,),
        padded=True,
        in_parts=True,
    )


def choose_template(wanted: str | None, trained: str | None, end_sym: str, published: Template = PUBLISHED) -> Template:
    """Return the template that is asked for, or the one that the checkpoint calls for.

    Args:
        wanted: "training", "benchmark", "A", "B", "C", a text with `{}` for the question (used like the training's), or
            None: the training's, and where that has no words (stages 1 and 2, on bare captions) A, as in the
            original's demo.
        trained: `prompt_template` of the checkpoint.
        end_sym: end symbol of the checkpoint; ends an answer in every template.
        published: the template called "benchmark".

    Raises:
        ConfigError: there is no such template.
    """
    check_template(wanted, "--template")
    if wanted is None:
        wanted = "A" if trained is None else TRAINING
    if wanted == TRAINING:
        return training_template(trained, end_sym)
    named = {**TEMPLATES, BENCHMARK: published}
    chosen = named.get(wanted) or replace(training_template(wanted, end_sym), name="own")
    return replace(chosen, stop=tuple(dict.fromkeys((*chosen.stop, end_sym))))
