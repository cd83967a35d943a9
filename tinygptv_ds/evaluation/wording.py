"""How questions are put to a model: template, stop, lengths. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tinygptv_ds.config.evaluation_section import check_template
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question
from tinygptv_ds.generate.templates import TEMPLATES
from tinygptv_ds.processing.text import IMAGE_TAG, wrap

_STOP = "###"  # between the turns of the published prompts


@dataclass(frozen=True)
class Settings:
    """Of one evaluation.

    Attributes:
        template: "benchmark": that of the published scripts; "training": that of the model; "A", "B", "C": the
            original's; else a template itself. None: benchmark where there is one, else training.
        max_new_tokens: of an answer at most.
        batch_size: questions that one rank asks at once. Questions share a batch by their number alone, so answers do
            not depend on the number of ranks.
        add_bos_token: start prompts with the BOS token, as in training.
    """

    template: str | None = None
    max_new_tokens: int = 20
    batch_size: int = 32
    add_bos_token: bool = False

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError("an evaluation needs a batch size and a number of new tokens of at least 1")


@dataclass(frozen=True)
class Wording:
    """How one benchmark is worded for one model.

    Attributes:
        template: with `{}` for images and words; None: no wrap.
        ours: whether words stand in it as in training, with a space behind them.
        end: what ends an answer.
        stop: where generation stops; "" at the end token alone.
        choice_end: what is appended to a choice before its likelihood is measured.
    """

    template: str | None
    ours: bool
    end: str
    stop: str
    choice_end: str

    def prompt(self, question: Question) -> str:
        """The whole prompt, with a placeholder for each image."""
        tags = IMAGE_TAG * question.image_count
        if not tags:
            return wrap(self.template, question.text)
        return wrap(self.template, f"{tags} {question.text}" + (" " if self.ours else ""))


def wording(benchmark: Benchmark, settings: Settings, training: str | None, end_sym: str) -> Wording:
    """The wording that `settings` ask for; `training` and `end_sym` are the model's own template and end of answers."""
    ours = True
    if settings.template in (None, "benchmark") and benchmark.template is not None:
        ours = False
        template, end, choice_end = benchmark.template, _STOP, "\n"  # the published scripts never set another end
    elif settings.template in (None, "benchmark", "training"):
        template, end, choice_end = training, end_sym, end_sym
    elif settings.template in TEMPLATES:
        ours = False
        template, end, choice_end = TEMPLATES[settings.template].prompt([("{}", None)]).text, _STOP, end_sym
    else:
        template, end, choice_end = settings.template, _STOP, end_sym
    return Wording(template, ours, end, "" if benchmark.whole_continuation else end, choice_end)
