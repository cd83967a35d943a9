"""Captions: COCO (Karpathy's split, BLIP's file), TextCaps, and MiniGPT-4's hand-checked CC/SBU set."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import COCO, Built, Entry, Samples, inside, load_entries, turn


def coco_caption(root: Path) -> Iterator[Entry]:
    """Yield the entries of `coco_caption/coco_karpathy_train.json` whose image path contains "train"."""

    def build(entry: dict) -> Built:
        if "train" not in entry["image"]:
            return None
        record = turn("caption", "", entry["caption"], clean=["answer"], image_id=entry["image_id"])
        return record, [inside(root, COCO, Path(entry["image"]).name)]

    return Samples(load_entries(root / "coco_caption/coco_karpathy_train.json"), build)


def textcaps_caption(root: Path) -> Iterator[Entry]:
    """Yield the entries of `textcaps/TextCaps_0.1_train.json`, images `textcaps/train_images/<image_id>.jpg`."""

    def build(entry: dict) -> Built:
        record = turn("caption", "", entry["caption_str"], clean=["answer"], image_id=entry["image_id"])
        return record, [inside(root, "textcaps/train_images", f"{entry['image_id']}.jpg")]

    return Samples(load_entries(root / "textcaps/TextCaps_0.1_train.json", "data"), build)


def cc_sbu_align(root: Path) -> Iterator[Entry]:
    """Yield the entries of `cc_sbu_align/filter_cap.json`, images `cc_sbu_align/image/<image_id>.jpg`."""

    def build(entry: dict) -> Built:
        record = {"caption": entry["caption"], "clean": [], "image_id": entry["image_id"]}
        return record, [inside(root, "cc_sbu_align/image", f"{entry['image_id']}.jpg")]

    return Samples(load_entries(root / "cc_sbu_align/filter_cap.json"), build)
