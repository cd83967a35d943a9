"""How questions are put to a model: template, stop, lengths. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinygptv_ds.config.template_names import BENCHMARK, TRAINING, check_template
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question
from tinygptv_ds.generate.conversation import Conversation, Prompt
from tinygptv_ds.generate.templates import PUBLISHED, Template, choose_template

if TYPE_CHECKING:
    from tinygptv_ds.generate.conversation import PromptImage

_END = "###"  # between the turns of the original's prompts; its scripts set no other end


@dataclass(frozen=True)
class Settings:
    """How an evaluation puts its questions.

    Attributes:
        template: a name of `TEMPLATE_NAMES` or a text with `{}` for the question; None: "benchmark" where the
            benchmark has a published template, else "training".
        max_new_tokens: the maximum length of an answer.
        batch_size: questions per batch of one rank. Which questions share a batch depends only on their numbers, so
            answers do not depend on the number of ranks.
        add_bos_token: whether prompts start with the BOS token, as in training.
    """

    template: str | None = None
    max_new_tokens: int = 20
    batch_size: int = 32
    add_bos_token: bool = False

    def __post_init__(self) -> None:
        check_template(self.template, "--template")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError("an evaluation needs a batch size and a number of new tokens of at least 1")


@dataclass(frozen=True)
class Wording:
    """How the questions of one benchmark are worded for one model.

    Attributes:
        template: the words around a question, with where generation stops.
        end: what ends an answer.
        choice_end: what is appended to a choice before its likelihood is computed.
    """

    template: Template
    end: str
    choice_end: str

    @property
    def stop(self) -> str:
        """The text at which generation stops; "" for the end token only."""
        return "".join(self.template.stop)

    def text(self, question: Question) -> str:
        """Return the whole prompt as text, with a placeholder for each image.

        Raises:
            DataError: the question places another number of images than it has.
        """
        try:
            placed = self.template.place_images(question.text, question.image_count)
        except DataError as error:
            raise DataError(f"question {question.key}: {error}") from None
        return "".join(self.template.parts([(placed, None)]))

    def prompt(self, question: Question, images: Sequence[PromptImage]) -> Prompt:
        """Return the prompt of a question with its images.

        Raises:
            DataError: the question places another number of images than it has.
        """
        return Conversation(self.template).ask(question.text, images)


def wording(benchmark: Benchmark, settings: Settings, training: str | None, end_sym: str) -> Wording:
    """Return the wording that `settings` ask for.

    Args:
        benchmark: what is asked.
        settings: template and BOS token.
        training: `prompt_template` of the model.
        end_sym: end symbol of the model.
    """
    name = settings.template or BENCHMARK
    if name == BENCHMARK and benchmark.template is None:
        name = TRAINING
    template = choose_template(name, training, end_sym, benchmark.template or PUBLISHED)
    end = end_sym if name == TRAINING else _END
    stop = () if benchmark.whole_continuation else (end,)
    template = replace(template, add_bos_token=settings.add_bos_token, stop=stop)
    return Wording(template, end, "\n" if name == BENCHMARK else end_sym)
