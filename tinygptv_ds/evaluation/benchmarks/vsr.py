"""VSR, zero-shot test split: whether a statement about an image is true (Hugging Face cambridgeltl/vsr_zeroshot)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.answer_scores import clean_answer, vsr_hit, vsr_points
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.processing.templates import PUBLISHED

PLACES = {"questions": "vsr/test.jsonl", "images": "vsr/vsr_images"}


def _points(question: Question, text: str, *, compat: bool) -> float:
    return 100.0 * vsr_hit(text, question.truth, compat=compat)


BENCHMARK = Benchmark(
    rules={
        **strict_and_compat(_points),
        "compat_v2": lambda question, text: 100.0 * vsr_points(text, question.truth),
    },
    template=PUBLISHED,
    parsable=lambda question, text: clean_answer(text).lower() in ("true", "false"),
    whole_continuation=True,
)
_TEXT = "[vqa] Based on the image, is this statement true or false? {}"


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the statements; entries hold `image`, `caption` and `label` (0 or 1).

    Images are in `train2017` and `val2017`, or directly in the folder.
    """
    file, images = places["questions"], places["images"]
    fields = {"image": str, "caption": str, "label": int}
    questions = []
    for key, entry in checks.entries(file, checks.content(file, "vsr.questions=FILE"), fields, binary_label):
        places_of_it = [images / folder / entry["image"] for folder in ("train2017", "val2017", "")]
        path = checks.image("vsr.images", *places_of_it)
        truth = "true" if entry["label"] else "false"
        questions.append(Question(key, _TEXT.format(entry["caption"]), truth, image_file(path)))
    return questions


def binary_label(entry: dict) -> str | None:
    """Return what is wrong with the `label` of an entry; None if it is correct."""
    return None if entry["label"] in (0, 1) else f"has the label {entry['label']}, which is neither 0 nor 1"
