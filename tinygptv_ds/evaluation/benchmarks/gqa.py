"""GQA, testdev balanced: short answers, in GQA's own file (an object by question id) or as a list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.answer_scores import SHORT_ANSWER, gqa_hit
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.processing.templates import PUBLISHED

PLACES = {"questions": "gqa/testdev_balanced_questions.json", "images": "gqa/gqa_images"}


def _points(question: Question, text: str, *, compat: bool) -> float:
    return 100.0 * gqa_hit(text, question.truth, compat=compat)


BENCHMARK = Benchmark(
    rules=strict_and_compat(_points),
    template=PUBLISHED,
    whole_continuation=True,
)


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the questions; entries hold `question`, `answer`, and `image`, a file name, or `imageId`, as in GQA."""
    content = checks.content(places["questions"], "gqa.questions=FILE")
    image = "imageId" if isinstance(content, dict) else "image"
    fields = {"question": str, "answer": str, image: str}
    questions = []
    for key, entry in checks.entries(places["questions"], content, fields):
        name = entry[image] if image == "image" else f"{entry[image]}.jpg"
        path = checks.image("gqa.images", places["images"] / name)
        questions.append(Question(key, SHORT_ANSWER.format(entry["question"]), entry["answer"], image_file(path)))
    return questions
