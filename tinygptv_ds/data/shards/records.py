"""The record of a sample: its JSON, or its caption in a text file; and the reasons for which a sample drops out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinygptv_ds.data.shards.members import CAPTION, RECORD, Member
from tinygptv_ds.errors import DataError

REASONS = (
    "missing_record",
    "bad_json",
    "bad_record",
    "missing_image",
    "ambiguous_images",
    "corrupt_image",
    "unsupported_image",
    "unsupported_depth",
    "truncated",
    "unreadable",
    "unreadable_shard",
    "empty_answer",
    "no_target_tokens",
    "too_long",
    "torn_features",
)
_SHAPES = ("caption", "conversation", "answer")  # keys of which a record needs one, see processing/text.py
_TALKS = ("conversations", "messages")  # the same of other trainers
_QUESTIONS = ("question", "query", "instruction", "prompt")
_ANSWERS = ("answer", "answers", "response", "output")
_IMAGE_KEYS = ("image", "images", "img", "image_path", "image_paths", "image_file", "video", "videos")


class SampleError(DataError):
    """One sample that cannot be used. `reason` is one of `REASONS`, the message says which sample and why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, str(self))  # so that it survives the way from a worker process


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """Parse a sample's ``json`` member; `where` names the sample. A list of turns is a conversation.

    Raises:
        SampleError: it is not a JSON object.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{where}: .json cannot be parsed: {error}") from error
    if isinstance(record, list) and record and all(isinstance(turn, dict) for turn in record):
        return {"conversations": record}
    if not isinstance(record, dict):
        raise SampleError("bad_json", f"{where}: .json holds a {type(record).__name__}, not an object")
    return record


def holds_sample(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a caption, an answer or a conversation, in whatever state."""
    return any(key in record for key in _SHAPES) or _is_foreign(record)


def read_record(members: Sequence[Member], read: Callable[[Member], bytes], where: str) -> dict[str, Any]:
    """Read the record of a sample as it is stored, with the caption from a text file next to it.

    Args:
        members: of the sample.
        read: returns the content of one.
        where: names the sample, for messages.

    Raises:
        SampleError: there is no record, or it cannot be parsed.
    """
    by_suffix = {member.suffix: member for member in members}
    text = by_suffix.get(CAPTION)
    record = parse_record(read(by_suffix[RECORD]), where) if RECORD in by_suffix else {}
    if text is None and RECORD in by_suffix:
        return record
    if text is None:
        others = ", ".join(f".{member.suffix}" for member in members) or "nothing"
        raise SampleError(
            "missing_record",
            f"{where}: has no .json member, but {others}; the members of a sample need one name up to its first dot, "
            "such as 7.json and 7.jpg",
        )
    try:
        caption = read(text).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"{where}: its text file is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        raise SampleError("bad_record", message) from error
    return {**record, "caption": caption}


def plain_record(record: Mapping[str, Any], images: int, where: str) -> dict[str, Any]:
    """Return a record in a form that processing/text.py reads, for a sample with so many images.

    Raises:
        SampleError: bad_record, or missing_image where the record names one that is not there.
    """
    if not images and ("caption" in record or any(record.get(key) for key in _IMAGE_KEYS)):
        named = next((f"names {key} {str(record[key])[:100]!r}" for key in _IMAGE_KEYS if record.get(key)), None)
        what = "a caption without an image" if named is None else f"its record {named}, but there is no image member"
        raise SampleError("missing_image", f"{where}: {what}")
    if not _is_foreign(record):
        return dict(record)
    from tinygptv_ds.data.sets.own_entries import record_of  # the tables of datasets, which own records do not need

    try:
        return record_of(record, images)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error


def _is_foreign(record: Mapping[str, Any]) -> bool:
    """Return whether a record is another trainer's: a conversation, or a question that is not under ``text``."""
    asked = any(key in record for key in _QUESTIONS) and not ("text" in record or "pool" in record)
    if "caption" in record or "conversation" in record or ("answer" in record and not asked):
        return False
    return any(key in record for key in _TALKS) or (asked and any(key in record for key in _ANSWERS))
