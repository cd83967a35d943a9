"""OCR-VQA: questions about book covers."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from tinygptv_ds.data.sets.common import Built, Entry, SkipEntry, convert, inside, load_json, turn


def ocrvqa(root: Path) -> Iterator[Entry]:
    """Every question of the training covers (split 1) in `ocrvqa/dataset.json`, pictures in `ocrvqa/images/`."""
    covers = load_json(root / "ocrvqa/dataset.json")

    def build(entry: tuple[str, str | None, str | None]) -> Built:
        image_id, question, answer = entry
        cover = covers[image_id]
        if cover["split"] != 1:
            return None
        if len(cover["questions"]) != len(cover["answers"]):
            raise SkipEntry("bad_record", f"{image_id}: as many questions as answers are needed")
        picture = inside(root, "ocrvqa/images", image_id + Path(cover["imageURL"]).suffix)
        return turn("vqa", question, answer, clean=["text", "answer"], image_id=image_id), [picture]

    pairs = (
        (image_id, question, answer)
        for image_id, cover in covers.items()
        for question, answer in zip_longest(cover["questions"], cover["answers"])
    )
    yield from convert(pairs, build)
