"""The record of a sample: its JSON, or its caption in a text file; and the reasons for which a sample drops out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinygptv_ds.data.shards.members import CAPTION, RECORD, Member
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import IMAGE_TAG

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
_IMAGE_KEYS = ("image", "images", "img", "image_path", "image_paths", "image_file", "video", "videos")
_MARK = "<image>"
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


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
    return any(key in record for key in (*_SHAPES, *_TALKS))


def read_record(members: Sequence[Member], read: Callable[[Member], bytes], where: str) -> dict[str, Any]:
    """Read the record of a sample as it is stored, with the caption that stands in a text file next to it.

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
    talk = next((key for key in _TALKS if key in record), None)
    if talk is None or any(key in record for key in _SHAPES):
        return dict(record)
    try:
        return _conversation(record[talk], images)
    except (TypeError, KeyError, LookupError, AttributeError) as error:
        detail = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise SampleError("bad_record", f"{where}: a turn of {talk!r} {detail}") from error
    except ValueError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error


def _conversation(turns: list[dict[str, str]], images: int) -> dict[str, Any]:
    """Return the record of LLaVA's ``from`` and ``value`` or OpenAI's ``role`` and ``content``."""
    who, what = ("role", "content") if turns and "role" in turns[0] else ("from", "value")
    spoken = [(turn[who], turn[what]) for turn in turns]
    system = spoken.pop(0)[1] if spoken and spoken[0][0] == "system" else None
    if spoken and _ROLES.get(spoken[0][0]) == 1:
        del spoken[0]
    for number, (role, _) in enumerate(spoken):
        if _ROLES.get(role) != number % 2:
            raise ValueError(f"turn {number} is from {role!r}; human and gpt must alternate")
    values: list[Any] = [text for _, text in spoken] + [None] * (len(spoken) % 2)
    pairs = [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]
    if any(_MARK in answer for _, answer in pairs if answer is not None):
        raise ValueError(f"an answer holds {_MARK}")
    if not pairs:
        raise ValueError("the conversation has no turn")
    raw = _place_images(pairs, images)
    if system:
        pairs[0][0] = f"{system}\n{pairs[0][0]}"
    return {"conversation": pairs, "clean": [], "raw": raw}


def _place_images(pairs: list[list[Any]], images: int) -> bool:
    """Replace the marks in the questions by image tags; return False if the images go in front, which needs no tag."""
    marks = sum(question.count(_MARK) for question, _ in pairs)
    if not marks:
        return False
    if marks != images:
        raise ValueError(f"the questions hold {_MARK} {marks} time(s) for {images} image(s)")
    first = pairs[0][0].strip()
    if images == 1 and (first.startswith(_MARK) or first.endswith(_MARK)):
        pairs[0][0] = first.replace(_MARK, "").strip()
        return False
    for pair in pairs:
        pair[0] = pair[0].replace(_MARK, IMAGE_TAG)
    return True
