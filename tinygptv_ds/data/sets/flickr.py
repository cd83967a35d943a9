"""MiniGPT-v2's filtered Flickr30k: grounded captions, and phrases with their boxes. Boxes come as finished text."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import Built, Entry, Samples, inside, load_entries, turn

FOLDER = "filtered_flickr"


def flickr_grounded_caption(root: Path) -> Iterator[Entry]:
    """Yield captions of the whole image with a box after every phrase."""
    return _samples(root, "groundedcaption.json", lambda e: turn("grounding", "", e["grounded_caption"]))


def flickr_caption_to_phrase(root: Path) -> Iterator[Entry]:
    """Yield captions as questions, their phrases and boxes as answers."""
    return _samples(root, "captiontobbox.json", lambda e: turn("detection", e["caption"], e["output"]))


def flickr_object_to_phrase(root: Path) -> Iterator[Entry]:
    """Yield phrases as questions, their boxes as answers."""

    def record(entry: dict) -> dict:
        return turn("detection", entry["phrase"], f"<p>{entry['phrase']}</p> {entry['bbox']}")

    return _samples(root, "phrasetobbox.json", record)


def _samples(root: Path, file: str, record: Callable[[dict], dict]) -> Iterator[Entry]:
    def build(entry: dict) -> Built:
        image = inside(root, FOLDER, "images", f"{entry['image_id']}.jpg")
        return record(entry) | {"image_id": entry["image_id"]}, [image]

    return Samples(load_entries(root / FOLDER / file), build)
