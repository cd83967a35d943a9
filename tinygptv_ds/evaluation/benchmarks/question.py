"""What a benchmark is: questions with their true answers, and rules that score answers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tinygptv_ds.generate.templates import Template

Answer = Any  # generated text, or the losses of a question's choices


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: its id in the benchmark's files.
        text: the words that go into the template, instruction included, images not.
        truth: the true answer as the rules take it; plain values as of JSON.
        images: gives its images, paths or encoded bytes, when they are needed.
        image_count: how many these are.
        facts: what else is known of it, such as an image's size.
        choices: the answers to choose from, where the likeliest is looked for.
    """

    key: str
    text: str
    truth: Any
    images: Callable[[], Sequence[Path | bytes]]
    image_count: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()


Rule = Callable[[Question, Answer], float]


def strict_and_compat(points: Callable[..., float]) -> dict[str, Rule]:
    """The rules of these two names, from `points(question, answer, compat=...)`."""
    return {"strict": partial(points, compat=False), "compat": partial(points, compat=True)}


@dataclass(frozen=True)
class Benchmark:
    """How a set of questions is asked and scored.

    Attributes:
        rules: points of one answer by rule; a score is their mean. Those called "compat..." see the whole
            continuation, the others what stands before the stop.
        template: that of the published script; None: the training's.
        parsable: whether an answer has the form that is asked for.
        shown: the answer as people read it, from the stopped text or the losses.
        whole_continuation: a rule looks behind `###`, so generation must not stop there.
        over_all: scores that need all answers at once, by name.
    """

    rules: Mapping[str, Rule]
    template: Template | None = None
    parsable: Callable[[Question, Answer], bool] = lambda question, answer: True
    shown: Callable[[Question, Answer], Any] = lambda question, answer: answer
    whole_continuation: bool = False
    over_all: Callable[[Sequence[Question], Sequence[str]], dict[str, float]] | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark with its questions, named for logs and files."""

    name: str
    benchmark: Benchmark
    questions: Sequence[Question]


def image_file(path: Path) -> Callable[[], Sequence[Path]]:
    """`Question.images` of one file."""
    return lambda: (path,)
