"""How questions are put to a model: template, stop, lengths. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from tinygptv_ds.config.template_names import BENCHMARK, TRAINING, check_template
from tinygptv_ds.errors import ConfigError, DataError
from tinygptv_ds.evaluation.benchmarks.held_out import CAPTION
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, Task
from tinygptv_ds.generate.conversation import Prompt, Turn, prompt_of
from tinygptv_ds.processing.templates import PUBLISHED, Template, choose_template
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG, load_prompts

if TYPE_CHECKING:
    from tinygptv_ds.generate.conversation import PromptImage

_MAX_TOKENS = 1024  # the longest answers of the published stage 4 (text.max_txt_len)
_END = "###"  # between the turns of the original's prompts; its scripts set no other end


@dataclass(frozen=True)
class Settings:
    """How an evaluation puts its questions.

    Attributes:
        template: a name of `TEMPLATE_NAMES` or a text with `{}` for the question; None: "benchmark" where the
            benchmark has a published template, else "training".
        max_new_tokens: the maximum length of an answer; None: see `answer_tokens`.
        batch_size: questions per batch of one rank. Which questions share a batch depends only on their numbers, so
            answers do not depend on the number of ranks.
        add_bos_token: whether prompts start with the BOS token, as in training; None: on held-out shards those that the
            model was trained with do.
    """

    template: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    add_bos_token: bool | None = None

    def __post_init__(self) -> None:
        check_template(self.template, "--template")
        if (self.max_new_tokens is not None and self.max_new_tokens < 1) or self.batch_size < 1:
            raise ConfigError("an evaluation needs a batch size and a number of new tokens of at least 1")


@dataclass(frozen=True)
class Wording:
    """How the questions of one benchmark are worded for one model.

    Attributes:
        template: the words around a question, with where generation stops.
        end: what ends an answer.
        choice_end: what is appended to a choice before its likelihood is computed.
        captions: what bare captions are asked for with; None: the image alone, without template.
    """

    template: Template
    end: str
    choice_end: str
    captions: str | None = CAPTION

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
            return self.prompt(question, [b""] * question.image_count).text
        except DataError as error:
            raise DataError(f"question {question.key}: {error}") from None

    def prompt(self, question: Question, images: Sequence[PromptImage]) -> Prompt:
        """Return the prompt of a question with its images, after its history.

        Raises:
            DataError: the question places another number of images than it has.
        """
        template, text = self.template, question.text
        if question.bare and self.captions is None:
            template, text = replace(template, system="", before="", question="{}"), IMAGE_PLACEHOLDER * len(images)
        elif question.bare:
            text = str(self.captions).replace(IMAGE_TAG, IMAGE_TAG * len(images), 1)
        if not question.padded:
            template = replace(template, padded=False)
        turns = [*question.history, (text, None)]
        placed = [asked.count(IMAGE_PLACEHOLDER) for asked, _ in turns]
        counts = placed if any(placed) else [len(images), *(0 for _ in turns[1:])]
        rest = iter(images)
        shown = [list(islice(rest, count)) for count in counts]
        return prompt_of(template, [Turn(q, seen, a) for (q, a), seen in zip(turns, shown, strict=True)])

    def instructions(self, task: Task) -> list[str] | None:
        """Return all words around stored questions that a task is asked with, `{}` for the question and "" for none.

        None on published benchmarks, whose words are fixed.
        """
        used = {(self.captions or "") if each.bare else each.instruction for each in task.questions}
        return sorted(each for each in used if each is not None) or None


def bare_captions(prompts: str | None) -> str | None:
    """Return what training asks for bare captions with, by `text.prompts` of the recipe: of a pool its first entry."""
    return None if prompts is None else load_prompts()[prompts][0]


def answer_tokens(task: Task, settings: Settings, end: str, count: Callable[[str], int]) -> int:
    """Return how many tokens an answer may have.

    Unless the settings say it, that is the number of the benchmark; on held-out shards it is raised to what the longest
    true answer takes, up to 1024, because an answer that is cut short would be scored as a wrong one.

    Args:
        task: the questions.
        settings: may say it.
        end: what ends an answer.
        count: returns the number of tokens of a text.
    """
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    least = task.benchmark.max_new_tokens
    if not task.benchmark.held_out:
        return least
    truths = (truth for question in task.questions for truth in _listed(question.truth))
    return max(least, min(max((count(truth + end) for truth in truths), default=0), _MAX_TOKENS))


def _listed(truth: str | list[str]) -> list[str]:
    return [truth] if isinstance(truth, str) else truth


def wording(
    benchmark: Benchmark, settings: Settings, training: str | None, end_sym: str, captions: str | None = CAPTION
) -> Wording:
    """Return the wording that `settings` ask for.

    Args:
        benchmark: what is asked.
        settings: template and BOS token.
        training: `prompt_template` of the model.
        end_sym: end symbol of the model.
        captions: what the model was trained to answer with bare captions (`bare_captions`).
    """
    name = settings.template or BENCHMARK
    if name == BENCHMARK and benchmark.template is None:
        name = TRAINING
    template = choose_template(name, training, end_sym, benchmark.template or PUBLISHED)
    end = end_sym if name == TRAINING else _END
    stop = () if benchmark.whole_continuation else (end,)
    as_trained = template.add_bos_token and benchmark.held_out
    add_bos_token = as_trained if settings.add_bos_token is None else settings.add_bos_token
    template = replace(template, add_bos_token=add_bos_token, stop=stop)
    if name != TRAINING and captions is None:  # another template is asked for, so the image alone is not what is meant
        captions = CAPTION
    return Wording(template, end, "\n" if name == BENCHMARK else end_sym, captions)
