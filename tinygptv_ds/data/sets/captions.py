"""Captions: COCO (Karpathy's split, BLIP's file), TextCaps, and MiniGPT-4's hand-checked CC/SBU set."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import (
    Built,
    Entry,
    Samples,
    coco_file,
    coco_image,
    first_file,
    inside,
    load_entries,
    turn,
)


def coco_caption(root: Path) -> Iterator[Entry]:
    """Yield the entries of `coco_caption/coco_karpathy_train.json` whose image path contains "train".

    Those are the captions of COCO's own `coco_caption/captions_train2014.json`, which is read where that is there.
    """

    def build(entry: dict) -> Built:
        if "image" not in entry:
            image = coco_image(root, f"{entry['image_id']:012}")
        elif "train" in entry["image"]:
            image = coco_file(root, Path(entry["image"]).name)
        else:
            return None
        return turn("caption", "", entry["caption"], clean=["answer"], image_id=entry["image_id"]), [image]

    files = (root / "coco_caption/coco_karpathy_train.json", root / "coco_caption/captions_train2014.json")
    return Samples(load_entries(first_file(*files)), build)


def textcaps_caption(root: Path) -> Iterator[Entry]:
    """Yield the entries of `textcaps/TextCaps_0.1_train.json`, images `textcaps/train_images/<image_id>.jpg`."""

    def build(entry: dict) -> Built:
        record = turn("caption", "", entry["caption_str"], clean=["answer"], image_id=entry["image_id"])
        name = f"{entry['image_id']}.jpg"
        folders = ("textcaps/train_images", "textcaps/train_val_images/train_images")
        return record, [first_file(*(inside(root, folder, name) for folder in folders))]

    return Samples(load_entries(root / "textcaps/TextCaps_0.1_train.json", "data"), build)


def cc_sbu_align(root: Path) -> Iterator[Entry]:
    """Yield the entries of `cc_sbu_align/filter_cap.json`, images `cc_sbu_align/image/<image_id>.jpg`."""

    def build(entry: dict) -> Built:
        record = {"caption": entry["caption"], "clean": [], "image_id": entry["image_id"]}
        return record, [inside(root, "cc_sbu_align/image", f"{entry['image_id']}.jpg")]

    return Samples(load_entries(root / "cc_sbu_align/filter_cap.json"), build)
