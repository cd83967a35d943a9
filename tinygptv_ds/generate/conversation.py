"""A loaded model with the template of its questions: conversations in, answers out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.generate import Answer, prompt_row, stream
from tinygptv_ds.generate.model_args import load_from
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.generate.templates import Conversation, Prompt, Template
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import Image, TinyGPTVProcessor


@dataclass(frozen=True)
class Turn:
    """A question with its images, and its answer unless that is wanted."""

    question: str
    images: Sequence[Image] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Answerer:
    """Answers conversations, one at a time.

    Attributes:
        model: from `load_model`.
        processor: from `load_model`.
        template: the words around questions and answers.
        name: of the model, for people and clients.
        show_prompts: print each prompt.
    """

    model: TinyGPTVForConditionalGeneration
    processor: TinyGPTVProcessor
    template: Template
    name: str
    show_prompts: bool = False

    def prompt(self, turns: Sequence[Turn], system: str | None = None) -> tuple[Prompt, list[Image]]:
        """The prompt for the last turn's answer, and all images.

        Args:
            turns: at least one; all but the last with an answer.
            system: stands in the place of what the template says before everything.

        Raises:
            DataError: the template has no such place, or a question places another number of images than it has.
        """
        template = self.template
        if system is not None:
            if not template.system:
                raise DataError(
                    f"template {template.name} has no place for a system message; say it in the first question"
                )
            template = replace(template, system=system)
        conversation = Conversation(template)
        for turn in turns:
            prompt = conversation.ask(turn.question, turn.images)
            if turn.answer is not None:
                conversation.answered(turn.answer)
        return prompt, conversation.images

    def prompt_tokens(self, prompt: Prompt, images: Sequence[Image]) -> int:
        """How long it is, images included.

        Raises:
            DataError: too long for an answer of a single token.
        """
        return len(prompt_row(self.model, self.processor, prompt, len(images), 1))

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self.model.config.text_config.max_position_embeddings

    def stream(self, prompt: Prompt, images: Sequence[Image], generation: Generation) -> Answer:
        """The answer as it comes; errors as of `generate.stream`."""
        if self.show_prompts:
            print(f"prompt ({self.prompt_tokens(prompt, images)} tokens): {prompt.text!r}", flush=True)
        return stream(self.model, self.processor, prompt, images, generation)


def open_answerer(args: argparse.Namespace, name: str | None = None) -> Answerer:
    """Load the model that a command line names; errors as of `load_from`.

    Args:
        args: with `add_model_arguments`.
        name: of the model (default: of its folder or file).
    """
    model, processor, template = load_from(args)
    return Answerer(model, processor, template, name or args.model.resolve().name, args.show_prompt)
