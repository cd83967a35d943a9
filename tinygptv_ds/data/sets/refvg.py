"""Visual Genome: find the region that a phrase describes."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import (
    Built,
    Entry,
    SkipEntry,
    box_string,
    convert,
    inside,
    load_entries,
    picture_size,
    turn,
)

FOLDER = "visual_genome"
MAX_AREA = 16384  # square pixels; regions from here on are left out


def refvg(root: Path) -> Iterator[Entry]:
    """Every small region of `region_descriptions.json`; `image_data.json` tells the picture's folder and name.

    The box is relative to the size of the picture itself, not to the one that is listed.
    """
    urls = {_id(image, "image_id"): image["url"] for image in load_entries(root / FOLDER / "image_data.json")}

    def build(entry: tuple[object, dict]) -> Built:
        image_id, region = entry
        if region["width"] * region["height"] >= MAX_AREA:
            return None
        if image_id not in urls:
            raise SkipEntry("bad_record", f"image {image_id} is not in image_data.json")
        picture = inside(root, FOLDER, *urls[image_id].split("/")[-2:])
        box = [region[field] for field in ("x", "y", "width", "height")]
        answer = box_string(box, picture_size(picture))
        ids = {"image_id": image_id, "region_id": _id(region, "region_id")}
        return turn("refer", region["phrase"], answer, clean=["text"], **ids), [picture]

    images = load_entries(root / FOLDER / "region_descriptions.json")
    yield from convert(((_id(image, "id"), region) for image in images for region in image["regions"]), build)


def _id(entry: dict, field: str) -> object:
    return entry[field] if field in entry else entry["id"]  # older releases say just "id"
