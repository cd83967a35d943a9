"""What the members of a sample are, by their suffixes: its record, its images in order, its caption."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from tinygptv_ds.processing.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, looks_like_image

RECORD = "json"
TEXTS = ("txt", "text", "caption")  # text files that are captions, where no record of a shard holds a sample;
CAPTION = "caption.txt"  # an index names them so then
FEATURE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # suffixes of an image's features in its place, and of one value
SKIPPED = "skipped.json"  # in shards of features: why the sample cannot be used
_VISION = IMAGE_SUFFIXES | UNREAD_SUFFIXES | FEATURE_BYTES.keys()


class Member(NamedTuple):
    """One file inside a tar. `offset` and `size` are in bytes; the content is stored there unchanged."""

    suffix: str
    offset: int
    size: int


class ImageOrderError(Exception):
    """Images of a sample whose order is unknown. `reason` is "ambiguous_images" or "missing_image"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@lru_cache(maxsize=4096)
def is_image(suffix: str) -> bool:
    """Return whether a member with this suffix is an image, of a format that is decoded or not, or its features."""
    return suffix.rpartition(".")[2] in _VISION


@lru_cache(maxsize=4096)
def is_record(suffix: str) -> bool:
    """Return whether a member with this suffix is a record or a caption."""
    return suffix in (RECORD, CAPTION, *TEXTS)


def image_members(members: Sequence[Member]) -> list[Member]:
    """Return the images of a sample in their order.

    That is the only one, whatever its name (``jpg``, ``image.jpg``), or several by their numbers: ``0.jpg``, ``1.jpg``,
    or ``image0.jpg``, ``image1.jpg``.

    Raises:
        ImageOrderError: several have one number or different names, or a number is missing.
    """
    found = [member for member in members if is_image(member.suffix)]
    placed = [(*_name_and_number(member.suffix), member) for member in found]
    if len(placed) == 1 and (placed[0][0] or not placed[0][1]):
        return found
    numbered: dict[int, Member] = {}
    for name, number, member in placed:
        position = number or 0
        if position in numbered or name != placed[0][0]:
            other = numbered.get(position, placed[0][2]).suffix
            raise ImageOrderError(
                "ambiguous_images",
                f"both .{other} and .{member.suffix} would be image {position}; number them from 0 on (0.jpg, 1.jpg, "
                "...), or leave those out that are no input"
                if position in numbered
                else f"which images, in which order, are .{other} and .{member.suffix}? Number them from 0 on (0.jpg, "
                "1.jpg, ...), or leave those out that are no input",
            )
        numbered[position] = member
    order = sorted(numbered)
    if order != list(range(len(order))) and not (placed[0][0] and order == list(range(1, len(order) + 1))):
        raise ImageOrderError("missing_image", f"images are numbered {order}, not from 0 on")
    return [numbered[position] for position in order]


def begins_as_image(member: Member, read: Callable[[Member], bytes]) -> bool:
    """Return whether a member whose name says nothing is an image by its first bytes, which `read` returns."""
    if member.suffix in (SKIPPED, *TEXTS) or is_record(member.suffix) or is_image(member.suffix):
        return False
    return looks_like_image(read(member._replace(size=min(member.size, 16))))


def unusable_image(member: Member) -> tuple[str, str] | None:
    """Return (reason, message) where a member is no image that could be decoded, whatever its content."""
    ending = member.suffix.rpartition(".")[2]
    if ending in UNREAD_SUFFIXES:
        return "unsupported_image", f".{member.suffix} is of a format that is not read; convert it to .jpg or .png"
    if not member.size:
        message = f".{member.suffix} has no content: an empty file, or a link, which tar follows with --dereference"
        return "missing_image", message
    return None


@lru_cache(maxsize=4096)
def _name_and_number(suffix: str) -> tuple[str, int | None]:
    """Split ``image_0.jpg`` into ("image", 0), ``0.jpg`` into ("", 0), ``image.jpg`` into ("image", None)."""
    match = re.fullmatch(r"(.*?)[._-]?(\d{0,9})", suffix.rpartition(".")[0], re.ASCII | re.DOTALL)
    name, number = match.groups() if match else (suffix, "")
    return name, int(number) if number else None
