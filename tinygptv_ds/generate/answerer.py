"""A loaded model with its template: what the commands chat, answer, serve and demo ask their questions of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tinygptv_ds.generate.conversation import Prompt, Turn, prompt_of
from tinygptv_ds.generate.decoding import Decoder
from tinygptv_ds.generate.generate import AnswerStream, answers
from tinygptv_ds.generate.inputs import describe, prompt_tokens
from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.sampling import row_seeds
from tinygptv_ds.generate.settings import Generation
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.templates import Template


@dataclass(frozen=True)
class Answerer:
    """A model that answers conversations in its template.

    Attributes:
        model: from `load_model`.
        processor: from `load_model`.
        template: the words around questions and answers.
        name: the model's name for users and clients.
        show_prompts: whether `row` and `stream` print each prompt.
    """

    model: TinyGPTVForConditionalGeneration
    processor: TinyGPTVProcessor
    template: Template
    name: str
    show_prompts: bool = False

    def prompt(self, turns: Sequence[Turn], system: str | None = None) -> Prompt:
        """Return the prompt for the answer to the last of `turns`.

        Args:
            turns: at least one; all but the last have an answer.
            system: replaces the template's own system message.

        Raises:
            DataError: the template has no system message, or a question places another number of images than it has.
        """
        return prompt_of(self.template if system is None else self.template.with_system(system), turns)

    def prompt_ids(self, prompt: Prompt, new_tokens: int = 1) -> list[int]:
        """Return the tokens of a prompt, those of images included.

        Raises:
            DataError: the prompt leaves no room for an answer of `new_tokens`.
        """
        return prompt_tokens(self.model, self.processor, prompt, new_tokens)

    @property
    def context(self) -> int:
        """The maximum number of tokens of prompt and answer together."""
        return self.model.config.text_config.max_position_embeddings

    @cached_property
    def max_characters(self) -> int:
        """A number of characters that no prompt exceeds: the context filled with the longest token."""
        return self.context * max(map(len, self.processor.tokenizer.get_vocab()))

    def describe(self, prompt: Prompt) -> str:
        """Return the exact text of a prompt, its length in tokens, and what ends the answer."""
        return describe(prompt, self.processor)

    def row(self, prompt: Prompt, generation: Generation, prompt_ids: list[int] | None = None) -> Row:
        """Return the row of an answer for a `decoder`; errors as of `generate.stream`.

        Args:
            prompt: from `prompt`.
            generation: settings.
            prompt_ids: its tokens, if they are known.
        """
        ids = self.prompt_ids(prompt, generation.max_new_tokens) if prompt_ids is None else prompt_ids
        if self.show_prompts:
            print(f"prompt ({len(ids)} tokens): {prompt.text!r}", flush=True)
        return Row(self.processor, prompt, ids, generation, row_seeds(generation.seed, [0])[0])

    def decoder(self) -> Decoder:
        """Return a batch for answers that are generated together."""
        return Decoder(self.model, self.processor)

    def stream(self, prompt: Prompt, generation: Generation) -> AnswerStream:
        """Generate the answer in pieces of text; raises as `generate.stream` does."""
        return AnswerStream(self.decoder(), self.row(prompt, generation))

    def answers(
        self, prompts: Sequence[Prompt], generation: Generation, *, batch_size: int, numbers: Sequence[int]
    ) -> Iterator[str]:
        """Generate the answer to each prompt; arguments and errors as of `generate.answers`."""
        return answers(self.model, self.processor, prompts, generation, batch_size=batch_size, numbers=numbers)
