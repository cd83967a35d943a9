"""RefCOCO, RefCOCO+ and RefCOCOg: from an expression to a box, and ("inv...") from a box to an expression.

Training references from REFER's own files, and the evaluation files of MiniGPT-v2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygptv_ds.data.sets.common import (
    Built,
    Entry,
    Samples,
    SkipEntry,
    box_string,
    coco_image,
    inside,
    load_entries,
    load_objects,
    read_image_size,
    turn,
)
from tinygptv_ds.errors import DataError
from tinygptv_ds.plain_pickle import load_plain


def refcoco(root: Path, name: str, split_by: str, *, inverse: bool = False) -> Iterator[Entry]:
    """Yield one sample per training reference of `refcoco_annotations/<name>`, with all its sentences to draw from."""
    folder = root / "refcoco_annotations" / name
    annotations = load_objects(folder / "instances.json")
    boxed = {annotation["id"]: annotation for annotation in annotations if "id" in annotation}

    def build(ref: dict) -> Built:
        if ref["split"] != "train":
            return None
        if ref["ann_id"] not in boxed:
            raise SkipEntry("bad_record", f"ref {ref['ref_id']}: annotation {ref['ann_id']} is not in instances.json")
        image = coco_image(root, f"{ref['image_id']:012}")
        box = box_string(boxed[ref["ann_id"]]["bbox"], read_image_size(image))
        sentences = [sentence["raw"] for sentence in ref["sentences"]]
        ids = {"ref_id": ref["ref_id"], "image_id": ref["image_id"]}
        if inverse:
            return turn("identify", box, sentences, clean=["answer"], **ids), [image]
        return turn("refer", sentences, box, clean=["text"], **ids), [image]

    return Samples(load_refs(folder / f"refs({split_by}).p"), build)


def refer(root: Path, annotations: Path | None = None, image_root: Path | None = None) -> Iterator[Entry]:
    """Yield one sample per sentence of MiniGPT-v2's evaluation files (``refcoco_testA.json``, ...).

    Entries are ``{img_id, sents, bbox, height, width}``; `img_id` is an image's name, a ``.jpg`` below `image_root` or
    `root`, and the number of an object. The box is relative to the size that is listed.
    """
    found = [annotations] if annotations else sorted(root.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{root}: which file holds the expressions? There are: {names}; name it with --annotations")

    def build(entry: dict) -> Built:
        image = inside(image_root or root, entry["img_id"].rpartition("_")[0] + ".jpg")
        box = box_string(entry["bbox"], (entry["width"], entry["height"]))
        kept = {field: entry[field] for field in ("img_id", "bbox", "width", "height")}
        return turn("refer", entry["sents"], box, **kept), [image]

    name = found[0].name
    return Samples(load_entries(found[0]), build, where=lambda number, _: f"{name}: entry {number}")


def load_refs(path: Path) -> list[dict[str, Any]]:
    """Read the list in a REFER pickle, written by Python 2 or 3.

    Only plain containers, strings and numbers are accepted: no class or function is ever looked up, so the file cannot
    run code, and its memory is bounded by its size. Raises DataError otherwise.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        try:
            refs = load_plain(data)
        except UnicodeDecodeError:  # Python 2 byte strings in the platform's encoding of then
            refs = load_plain(data, "latin-1")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a torn pickle can raise nearly anything
        raise DataError(f"{path}: is no readable pickle ({error}); fetch it again") from error
    if not isinstance(refs, list):
        raise DataError(f"{path}: holds a {type(refs).__name__}, not the list of references")
    return refs
