"""VizWiz, val: questions of blind people, with ten answers each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.answer_scores import vizwiz_accuracy
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.processing.templates import PUBLISHED

PLACES = {"questions": "vizwiz/val.json", "images": "vizwiz/vizwiz_images"}


def _points(question: Question, text: str, *, compat: bool) -> float:
    return 100.0 * vizwiz_accuracy(text, question.truth, compat=compat)


BENCHMARK = Benchmark(
    rules=strict_and_compat(_points),
    template=PUBLISHED,
    whole_continuation=True,
)
_TEXT = (
    "[vqa] The question is '{}' Based on the image, answer the question with a single word or phrase. "
    "and reply 'unanswerable' when the provided information is insufficient"
)


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the questions; entries hold `image`, `question` and `answers`, a list of objects with `answer`."""
    file = places["questions"]
    fields = {"image": str, "question": str, "answers": list}
    questions = []
    for key, entry in checks.entries(file, checks.content(file, "vizwiz.questions=FILE"), fields, odd_answers):
        path = checks.image("vizwiz.images", places["images"] / entry["image"])
        truths = [answer["answer"] for answer in entry["answers"]]
        questions.append(Question(key, _TEXT.format(entry["question"]), truths, image_file(path)))
    return questions


def odd_answers(entry: dict) -> str | None:
    """Return what is wrong with the `answers` of an entry; None if they are correct."""
    answers = entry["answers"]
    fine = answers and all(isinstance(each, dict) and isinstance(each.get("answer"), str) for each in answers)
    return None if fine else f"has {str(answers)[:60]} as 'answers', not a list of objects with the text 'answer'"
