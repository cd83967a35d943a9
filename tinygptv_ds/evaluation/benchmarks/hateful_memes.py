"""Hateful Memes, dev: whether a meme is hateful."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.answer_scores import hateful_memes_label
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.evaluation.benchmarks.vsr import binary_label
from tinygptv_ds.processing.templates import PUBLISHED

PLACES = {"questions": "hateful_meme/dev.jsonl", "images": "hateful_meme/hm_images"}


def _points(question: Question, text: str, *, compat: bool) -> float:
    return 100.0 * (hateful_memes_label(text, compat=compat) == question.truth)


BENCHMARK = Benchmark(
    rules=strict_and_compat(_points),
    template=PUBLISHED,
    whole_continuation=True,
    parsable=lambda question, text: hateful_memes_label(text) is not None,
)
_TEXT = "This is an image writting '{}'. Is this image hateful? Answer yes or no. Answer:"  # the published wording


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the questions; entries hold `img` (a path in the folder of images), `text` and `label` (0 or 1)."""
    file = places["questions"]
    fields = {"img": str, "text": str, "label": int}
    questions = []
    for key, entry in checks.entries(file, checks.content(file, "hm.questions=FILE"), fields, binary_label):
        path = checks.image("hm.images", places["images"] / entry["img"])
        questions.append(Question(key, _TEXT.format(entry["text"]), entry["label"], image_file(path)))
    return questions
