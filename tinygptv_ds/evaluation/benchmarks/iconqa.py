"""IconQA, choose_txt, val: the likeliest of a question's choices counts.

`choose_text_val.json` is not part of the download; without it the same questions are read from `problems.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygptv_ds.evaluation.answer_scores import SHORT_ANSWER
from tinygptv_ds.evaluation.benchmarks.file_checks import Checks, Fields
from tinygptv_ds.evaluation.benchmarks.question import Benchmark, Question, image_file
from tinygptv_ds.processing.templates import ICONQA

PLACES = {
    "questions": "iconvqa/choose_text_val.json",
    "problems": "iconvqa/problems.json",
    "images": "iconvqa/iconvqa_images",
}


def likeliest(losses: list[float]) -> int:
    """Return the index of the choice with the lowest loss, the first of equal ones."""
    return min(range(len(losses)), key=losses.__getitem__)


def _points(question: Question, losses: list[float]) -> float:
    return 100.0 * (likeliest(losses) == question.truth)


BENCHMARK = Benchmark(
    # One rule under both names: the original ranks by the mean losses of a batch, and its published batch size is one.
    rules={"strict": _points, "compat": _points},
    template=ICONQA,
    readable=lambda question, losses: question.choices[likeliest(losses)],
)


def read(places: Mapping[str, Path], checks: Checks) -> list[Question]:
    """Read the questions; entries hold `image_id`, `question`, `choices` and `answer`, the index of the right one."""
    file, images = places["questions"], places["images"]
    if file.is_file() or not places["problems"].is_file():
        content = checks.content(
            file, "iconvqa.questions=FILE, or the download's problems.json with iconvqa.problems=FILE"
        )
    else:
        file = places["problems"]
        content = choose_text(checks.content(file, "iconvqa.problems=FILE"))
    fields: Fields = {"image_id": (str, int), "question": str, "choices": list, "answer": int}
    questions = []
    for key, entry in checks.entries(file, content, fields, _odd_choices):
        number = str(entry["image_id"])
        folders = (images / number, images / "val/choose_txt" / number)
        path = checks.image("iconvqa.images", *(folder / "image.png" for folder in folders))
        text, choices = SHORT_ANSWER.format(entry["question"]), tuple(entry["choices"])
        questions.append(Question(key, text, entry["answer"], image_file(path), choices=choices))
    return questions


def choose_text(problems: Any) -> Any:
    """Return the content of `choose_text_val.json`, from that of the download's `problems.json`."""
    if not isinstance(problems, dict):
        return problems
    return [
        {**entry, "image_id": number}
        for number, entry in problems.items()
        if isinstance(entry, dict) and (entry.get("ques_type"), entry.get("split")) == ("choose_txt", "val")
    ]


def _odd_choices(entry: dict) -> str | None:
    choices = entry["choices"]
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return f"has {str(choices)[:60]} as 'choices', not a list of texts"
    if not 0 <= entry["answer"] < len(choices):
        return f"has the answer {entry['answer']}, but {len(choices)} choices, counted from 0"
    return None
