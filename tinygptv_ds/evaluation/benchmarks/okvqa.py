"""OK-VQA: questions that need knowledge beyond the image, scored as in VQA v2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.answer_scores import SHORT_ANSWER, okvqa_accuracy
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.evaluation.benchmarks.vizwiz import odd_answers
from tinygptv_ds.processing.templates import PUBLISHED

PLACES = {
    "questions": "okvqa/okvqa_test_split.json",
    "annotations": "okvqa/mscoco_val2014_annotations_clean.json",
    "all_questions": "okvqa/OpenEnded_mscoco_val2014_questions_clean.json",
    "images": "okvqa/okvqa_images",
}


def _points(question: Question, text: str, *, compat: bool) -> float:
    return okvqa_accuracy(text, question.truth, compat=compat)


BENCHMARK = Benchmark(
    rules=strict_and_compat(_points),
    template=PUBLISHED,
    whole_continuation=True,
)


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the questions of the split with their ten answers; the split must hold every question of the official list.

    Images have COCO 2017's names (`000000000042.jpg`) or those of 2014 (`COCO_val2014_000000000042.jpg`).
    """
    split = _entries(places, "questions", None, {"image_id": int, "question": str, "question_id": int}, checks)
    annotated = _entries(places, "annotations", "annotations", {"question_id": int, "answers": list}, checks)
    official = _entries(places, "all_questions", "questions", {"question_id": int}, checks)
    truths = {entry["question_id"]: [answer["answer"] for answer in entry["answers"]] for entry in annotated}
    asked = {entry["question_id"] for entry in split}
    _compare(checks, places["annotations"], "no answers to", sorted(asked - truths.keys()))
    unasked = sorted({entry["question_id"] for entry in official} - asked)
    _compare(checks, places["questions"], "not, though the official list has it,", unasked)
    questions = []
    for entry in split:
        name = f"{entry['image_id']:012}.jpg"
        path = checks.image("okvqa.images", *(places["images"] / each for each in (name, f"COCO_val2014_{name}")))
        number, text = entry["question_id"], SHORT_ANSWER.format(entry["question"])
        questions.append(Question(str(number), text, truths.get(number, []), image_file(path)))
    return questions


def _entries(
    places: Mapping[str, Path], place: str, inside: str | None, fields: Mapping[str, type], checks: Checks
) -> list[dict]:
    file = places[place]
    content = checks.content(file, f"okvqa.{place}=FILE")
    if inside is not None and isinstance(content, dict):
        content = content.get(inside)
        if content is None:
            checks.problem(f"{file}: has no {inside!r}; is it the right file?")
    also = odd_answers if "answers" in fields else lambda entry: None
    return [entry for _, entry in checks.entries(file, content, fields, also)]


def _compare(checks: Checks, file: Path, what: str, ids: list[int]) -> None:
    if ids:
        checks.problem(f"{file}: holds {what} {len(ids)} question(s), the first: {', '.join(map(str, ids[:3]))}")
