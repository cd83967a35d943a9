"""OCR-VQA: questions about book covers."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import Built, Entry, Samples, SkipEntry, inside, load_json, turn
from tinygptv_ds.errors import DataError


def ocrvqa(root: Path) -> Iterator[Entry]:
    """Yield every question of the training covers (split 1) in `ocrvqa/dataset.json`, images in `ocrvqa/images/`."""
    path = root / "ocrvqa/dataset.json"
    covers = load_json(path)
    if not isinstance(covers, dict) or not all(isinstance(cover, dict) for cover in covers.values()):
        raise DataError(f"{path}: is not one object that holds the covers, objects, by id; is it the right file?")

    def build(entry: tuple[str, Any, Any]) -> Built:
        image_id, question, answer = entry
        cover = covers[image_id]
        if cover["split"] != 1:
            return None
        if len(cover["questions"]) != len(cover["answers"]):
            raise SkipEntry("bad_record", f"{image_id}: as many questions as answers are needed")
        image = inside(root, "ocrvqa/images", image_id + Path(cover["imageURL"]).suffix)
        return turn("vqa", question, answer, clean=["text", "answer"], image_id=image_id), [image]

    return Samples([(image_id, *pair) for image_id, cover in covers.items() for pair in _pairs(cover)], build)


def _pairs(cover: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    questions, answers = cover.get("questions"), cover.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list):
        return [(None, None)]  # one broken entry, to be counted
    return zip_longest(questions, answers)
