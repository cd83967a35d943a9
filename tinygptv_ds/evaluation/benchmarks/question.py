"""The parts of a benchmark: questions with their true answers, and rules that score answers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tinygptv_ds.processing.templates import Template

Answer = Any  # generated text, or the losses of a question's choices


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: its id in the benchmark's files.
        text: its words, including the instruction, without images and template.
        truth: the true answer as the rules take it; plain values, as in JSON.
        images: returns its images, paths or encoded bytes, when they are needed.
        image_count: the number of its images.
        metadata: anything else that is known about it, such as the size of its image.
        choices: the answers to choose from, on benchmarks where the likeliest one counts.
        history: the questions before it, with their true answers. Unless they place the images themselves, the first
            one comes with them.
        padded: whether the template may put a space after it, as training does; not if it is stored with its images.
        instruction: the words around the stored question, with `{}` for it; None on published benchmarks.
        bare: whether it asks for a caption without any instruction, which the model asks for in its own way.
    """

    key: str
    text: str
    truth: Any
    images: Callable[[], Sequence[Path | bytes]]
    image_count: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    padded: bool = True
    instruction: str | None = None
    bare: bool = False


Rule = Callable[[Question, Answer], float]


def strict_and_compat(points: Callable[..., float]) -> dict[str, Rule]:
    """Return the rules of these two names, from `points(question, answer, compat=...)`."""
    return {"strict": partial(points, compat=False), "compat": partial(points, compat=True)}


@dataclass(frozen=True)
class Benchmark:
    """How a set of questions is asked and scored.

    Attributes:
        rules: the points of one answer, by name of the rule; a score is their mean. Rules whose name starts with
            "compat" get the whole continuation, the others the text before the stop.
        template: the template of the published script; None: that of the training.
        parsable: whether an answer has the form that is asked for.
        readable: the answer for the results, from the stopped text or the losses.
        whole_continuation: whether a rule reads on after `###`, as the original does in its benchmarks, so that
            generation must not stop there.
        corpus_scores: scores that need all answers at once, by name.
        corpus_names: their names.
        max_new_tokens: the default length of an answer.
        held_out: whether it is asked as in training: with the BOS token, and with room for the longest true answer.
    """

    rules: Mapping[str, Rule]
    template: Template | None = None
    parsable: Callable[[Question, Answer], bool] = lambda question, answer: True
    readable: Callable[[Question, Answer], Any] = lambda question, answer: answer
    whole_continuation: bool = False
    corpus_scores: Callable[[Sequence[Question], Sequence[str]], dict[str, float]] | None = None
    corpus_names: tuple[str, ...] = ()
    max_new_tokens: int = 20
    held_out: bool = False


@dataclass(frozen=True)
class Task:
    """A benchmark with its questions, and its name in logs and files."""

    name: str
    benchmark: Benchmark
    questions: Sequence[Question]


def image_file(path: Path) -> Callable[[], Sequence[Path]]:
    """Return the `Question.images` of one file."""
    return lambda: (path,)
