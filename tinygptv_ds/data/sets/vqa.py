"""Short answers to questions about images: VQAv2, OK-VQA, A-OKVQA (LAVIS' files) and GQA.

The ten annotators' answers are kept as they are, so that drawing one uniformly draws each by its share.
"""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import COCO, Built, Entry, Samples, inside, load_entries, load_json, turn


def coco_question(root: Path, files: tuple[str, ...], answers: str = "answer") -> Iterator[Entry]:
    """Yield questions about COCO training images; a second file (VQAv2's validation part) may be left out."""

    def build(entry: dict) -> Built:
        image = inside(root, COCO, Path(entry["image"]).name)
        return _question(entry, entry[answers]), [image]

    present = [root / file for number, file in enumerate(files) if number == 0 or (root / file).exists()]
    return Samples([entry for file in present for entry in load_entries(file)], build)


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
