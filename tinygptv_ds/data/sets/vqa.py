"""Short answers to questions about images: VQAv2, OK-VQA, A-OKVQA (LAVIS' files) and GQA.

The ten annotators' answers are kept as they are, so that drawing one uniformly draws each by its share.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import (
    Built,
    Entry,
    Samples,
    coco_file,
    coco_image,
    inside,
    load_entries,
    load_json,
    load_objects,
    turn,
)

# LAVIS' files, and those of vqav2 and okvqa from which they were made: questions, annotations.
OFFICIAL = {
    "vqav2/vqa_train.json": (
        "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        "vqav2/v2_mscoco_train2014_annotations.json",
    ),
    "vqav2/vqa_val.json": (
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        "vqav2/v2_mscoco_val2014_annotations.json",
    ),
    "okvqa/okvqa_train.json": (
        "okvqa/OpenEnded_mscoco_train2014_questions.json",
        "okvqa/mscoco_train2014_annotations.json",
    ),
}


def coco_question(root: Path, files: tuple[str, ...], answers: str = "answer") -> Iterator[Entry]:
    """Yield questions about COCO training images; a second file (VQAv2's validation part) may be left out."""

    def build(entry: dict) -> Built:
        if "image" in entry:
            image = coco_file(root, Path(entry["image"]).name)
        else:
            image = coco_image(root, f"{entry['image_id']:012}")
        return _question(entry, entry[answers]), [image]

    return Samples([entry for file in files for entry in _entries(root, file, optional=file != files[0])], build)


def _entries(root: Path, file: str, *, optional: bool) -> list[Any]:
    """Read one of LAVIS' files, or join the two of which it was made."""
    if (root / file).exists() or file not in OFFICIAL:
        return [] if optional and not (root / file).exists() else load_entries(root / file)
    questions, annotations = (root / name for name in OFFICIAL[file])
    if not questions.exists() and not annotations.exists() and optional:
        return []
    answers = {entry.get("question_id"): entry for entry in load_objects(annotations)}
    part = "val" if "val" in questions.name else "train"
    return [
        {
            **entry,
            "image": f"COCO_{part}2014_{entry['image_id']:012}.jpg",
            "answer": [found["answer"] for found in answers[entry["question_id"]]["answers"]],
        }
        if entry.get("question_id") in answers and "image_id" in entry
        else entry
        for entry in load_objects(questions, "questions")
    ]


def gqa(root: Path) -> Iterator[Entry]:
    """Yield the entries of `gqa/train_balanced_questions.json`, a list (LAVIS) or an object keyed by question (GQA)."""
    path = root / "gqa/train_balanced_questions.json"
    content = load_json(path)
    if isinstance(content, dict) and "annotations" not in content:
        entries = [{"question_id": key} | e if isinstance(e, dict) else e for key, e in content.items()]
    else:
        entries = load_entries(path)

    def build(entry: dict) -> Built:
        name = entry["image"] if "image" in entry else f"{entry['imageId']}.jpg"
        return _question(entry, entry["answer"]), [inside(root, "gqa/images", name)]

    return Samples(entries, build)


def _question(entry: dict, answer: str | list[str]) -> dict:
    clean = ["text", "answer"]
    return turn("vqa", entry["question"], answer, clean=clean, question_id=entry.get("question_id"))
