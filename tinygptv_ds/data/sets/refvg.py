"""Visual Genome: find the region that a phrase describes."""

from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.data.sets.common import (
    Built,
    Entry,
    Samples,
    SkipEntry,
    box_string,
    first_file,
    inside,
    load_objects,
    read_image_size,
    turn,
)

FOLDER = "visual_genome"
MAX_AREA = 16384  # square pixels; regions from here on are left out


def refvg(root: Path) -> Iterator[Entry]:
    """Yield every small region of `region_descriptions.json`; `image_data.json` holds the image's folder and name.

    Both folders of images may be merged into the first, or be in ``images``. The box is relative to the size of the
    image itself, not to the one that is listed.
    """
    urls = {_id(image, "image_id"): image.get("url") for image in load_objects(root / FOLDER / "image_data.json")}

    def build(entry: tuple[dict, dict | None]) -> Built:
        image, region = entry
        if region is None:
            raise KeyError("regions")
        image_id = _id(image, "id")
        if region["width"] * region["height"] >= MAX_AREA:
            return None
        url = urls.get(image_id)
        if url is None:
            raise SkipEntry("bad_record", f"image {image_id} is not in image_data.json, or without a url")
        folder, name = url.split("/")[-2:]
        places = ((folder, name), ("VG_100K", name), ("images", folder, name), ("images", name))
        path = first_file(*(inside(root, FOLDER, *place) for place in places))
        box = [region[field] for field in ("x", "y", "width", "height")]
        answer = box_string(box, read_image_size(path))
        ids = {"image_id": image_id, "region_id": _id(region, "region_id")}
        return turn("refer", region["phrase"], answer, clean=["text"], **ids), [path]

    images = load_objects(root / FOLDER / "region_descriptions.json")
    pairs = ((image, region) for image in images for region in _regions(image))
    return Samples(pairs, build, total=sum(len(_regions(image)) for image in images))


def _regions(image: dict) -> list[dict | None]:
    regions = image.get("regions")
    return regions if isinstance(regions, list) else [None]  # one broken entry, to be counted


def _id(entry: dict, field: str) -> object:
    return entry.get(field, entry.get("id"))  # older releases have just "id"
