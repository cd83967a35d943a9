"""RefCOCO, RefCOCO+ and RefCOCOg: the box that an expression refers to, from MiniGPT-v2's evaluation files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinygptv_ds.evaluation.benchmarks.file_checks import Checks, Fields
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file, strict_and_compat
from tinygptv_ds.evaluation.box_scores import clean_box_answer, counts_as_hit, is_well_formed
from tinygptv_ds.processing.templates import PUBLISHED

LOCATE = "[refer] give me the location of {}"
_NUMBER = (int, float)


def places(name: str) -> dict[str, str]:
    """Return the files of `refcoco`, `refcoco+` or `refcocog`: `NAME_SPLIT.json` and COCO 2014's training images."""
    return {"annotations": name, "images": "coco/train2014"}


def _points(question: Question, text: str, *, compat: bool) -> float:
    size = question.metadata
    hit = counts_as_hit(
        text, question.truth, size["width"], size["height"], resolution=size.get("resolution", 100), compat=compat
    )
    return 100.0 * hit


BENCHMARK = Benchmark(
    rules=strict_and_compat(_points),
    template=PUBLISHED,
    whole_continuation=True,
    parsable=lambda question, text: is_well_formed(clean_box_answer(text)),
)


def read(name: str, split: str, places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read a split; entries hold `img_id` (image name and object number), `sents`, `bbox`, `width` and `height`."""
    file = places["annotations"] / f"{name}_{split}.json"
    fields: Fields = {"img_id": str, "sents": str, "bbox": list, "width": _NUMBER, "height": _NUMBER}
    content = checks.content(file, f"{name}.annotations=FOLDER")
    questions = []
    for key, entry in checks.entries(file, content, fields, _odd_box):
        path = checks.image(f"{name}.images", places["images"] / f"{entry['img_id'].rpartition('_')[0]}.jpg")
        size = {"width": entry["width"], "height": entry["height"], "img_id": entry["img_id"]}
        text = LOCATE.format(entry["sents"])
        questions.append(Question(key, text, entry["bbox"], image_file(path), metadata=size))
    return questions


def _odd_box(entry: dict) -> str | None:
    box = entry["bbox"]
    if len(box) != 4 or not all(isinstance(number, _NUMBER) and not isinstance(number, bool) for number in box):
        return f"has {str(box)[:60]} as 'bbox', not [x, y, width, height]"
    if entry["width"] <= 0 or entry["height"] <= 0:
        return f"has an image of {entry['width']} x {entry['height']} pixels"
    return None
